"""Four columns of translations, captions and pictures from one batch; the peer is ourselves, one after another.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m bench.columns [--rounds 5] [--only WORD] [--width 0.5]

The columns are the base, two adapters of unequal rank and targets, and a mix of them, on the built-in toys. Seconds
are CPU time, as in `bench.instant`. `--only sizes` is one call of a UNet with random weights in Stable Diffusion 1's
shape, its width multiplied by `--width`, for pictures of several sizes: where a batch stops being faster on a CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import instant, measuring

WHO: list[Any] = [None, "a0", "a1", {"a0": 0.6, "a1": 0.6}]
SIDES = (16, 32, 64)


def adapters(base: Any, folder: Path, targets: Sequence[Sequence[str]]) -> list[Path]:
    """Adapters of ranks 4 and 8 with random values; the base is left as it was."""
    import torch

    import engine

    places = []
    for number, names in enumerate(targets):
        config = engine.LoraConfig(r=4 << number, target_modules=list(names), init_lora_weights=False)
        torch.manual_seed(number)
        model = engine.get_peft_model(base, config)
        with torch.no_grad():
            for parameter in model.adapter_parameters().values():
                parameter *= 0.1
        model.save_pretrained(folder / f"a{number}")
        model.unload()
        places.append(folder / f"a{number}")
    return places


def compared(
    name: str, answerer: Any, base: Any, targets: Sequence[Sequence[str]], message: Any, sampling: Any, rounds: int
) -> dict[str, Any]:
    """The row of one family."""

    def asked(who: list[Any]) -> None:
        assert len(list(answerer.stream([message], who, sampling))) == len(who)

    with tempfile.TemporaryDirectory() as folder:
        for number, place in enumerate(adapters(base, Path(folder), targets)):
            answerer.attach(f"a{number}", place)
    together = (lambda: asked(WHO), instant.nothing)
    apart = (lambda: [asked([row]) for row in WHO], instant.nothing)
    return instant.row(f"{len(WHO)} {name} (one after another)", together, apart, 1.0, rounds)


def translations(rounds: int) -> Iterator[dict[str, Any]]:
    from engine.generation import Answerer, Sampling

    message = {"content": "modernise: And thou shalt say unto them, Ye have sinned a great sin."}
    targets = (["q", "v"], ["q", "k", "v", "o", "wi_0", "wi_1", "wo"])
    for name, sampling in (
        ("translations by beams", Sampling(max_new_tokens=24, temperature=0)),
        ("translations drawn", Sampling(max_new_tokens=24, seed=1)),
    ):
        answerer = Answerer("tiny-t5", "fp32")
        yield compared(name, answerer, answerer.model, targets, message, sampling, rounds)


def captions(rounds: int) -> Iterator[dict[str, Any]]:
    from engine.captioning import Captioner
    from engine.data import load
    from engine.generation import Sampling

    message = {"image": load(measuring.ROOT / "examples" / "emoji_grounds.zip").examples[0]["image"]}
    targets = (["query", "value"], ["query", "key", "dense"])
    for name, sampling in (
        ("captions by beams", Sampling(max_new_tokens=24, temperature=0)),
        ("captions drawn", Sampling(max_new_tokens=24, seed=1)),
    ):
        answerer = Captioner("tiny-blip", "fp32")
        yield compared(name, answerer, answerer.model, targets, message, sampling, rounds)


def pictures(rounds: int) -> Iterator[dict[str, Any]]:
    from engine.generation import Sampling
    from engine.painting import Painter

    painter = Painter("tiny-sd", "fp32")
    targets = (["to_q", "to_v"], ["to_q", "to_k", "to_v", "to_out.0"])
    sampling = Sampling(steps=20, guidance=7.5, seed=1)
    yield compared("pictures", painter, painter.pipeline.unet, targets, {"content": "a red apple"}, sampling, rounds)


def sizes(rounds: int, width: float) -> Iterator[dict[str, Any]]:
    """One step of the columns' pictures, each with and without its words."""
    import torch
    from diffusers import UNet2DConditionModel

    import engine

    torch.manual_seed(0)
    channels = tuple(int(count * width) // 32 * 32 for count in (320, 640, 1280, 1280))
    unet = UNet2DConditionModel(block_out_channels=channels, cross_attention_dim=768, attention_head_dim=8).eval()
    plain = {"init_lora_weights": False}
    model = engine.get_peft_model(unet, engine.LoraConfig(r=4, target_modules=["to_q", "to_v"], **plain), "a0")
    model.add_adapter("a1", engine.LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], **plain))
    model.eval()
    size = sum(parameter.numel() for parameter in unet.parameters()) / 1e6

    def step(who: list[Any], side: int) -> Callable[[], None]:
        rows = 2 * len(who)
        latents, words = torch.randn(rows, 4, side, side), torch.randn(rows, 77, 768)

        @torch.no_grad()
        def run() -> None:
            with model.answering(who * 2):
                unet(latents, 10, words)

        return run

    for side in SIDES:
        apart = [step([row], side) for row in WHO]
        together = (step(WHO, side), instant.nothing)
        what = f"4 columns, a UNet of {size:.0f} M, latents of {side} x {side} (one after another)"
        yield instant.row(what, together, (lambda apart=apart: [one() for one in apart], instant.nothing), 1.0, rounds)


def families(rounds: int) -> Iterator[dict[str, Any]]:
    """All families on their toys."""
    for family in (translations, captions, pictures):
        yield from family(rounds)


def rows(rounds: int = instant.ROUNDS, only: str = "", width: float = 0.5) -> list[dict[str, Any]]:
    """The families' rows, or those that `only` names."""
    if only == "sizes":
        return list(sizes(rounds, width))
    return list({"": families, "words": translations, "captions": captions, "pictures": pictures}[only](rounds))


if __name__ == "__main__":
    measuring.command_line(
        __doc__,
        rows,
        ("--rounds", {"type": int, "default": instant.ROUNDS}),
        ("--only", {"choices": ("", "words", "captions", "pictures", "sizes"), "default": ""}),
        ("--width", {"type": float, "default": 0.5}),
    )
