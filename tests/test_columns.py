"""Columns of translations, captions and pictures are one batch, in which each is what it is alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from engine import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model, painting
from engine.adapters.base import AdapterConfig
from engine.blending import Blender, attach_blend
from engine.captioning import Captioner
from engine.checkpoint import save_adapter
from engine.columns import batches
from engine.combinations import Blend
from engine.data import load
from engine.errors import PromptError
from engine.generation import Answerer, Sampling
from engine.layers import AdapterLayer
from engine.painting import Painter
from engine.paths import REPOSITORY
from engine.rows import Row, mix_of
from engine.seq2seq import answers, write
from engine.tasks.captioning import Captioning
from engine.tasks.seq2seq import Seq2Seq
from engine.text_encoders import TARGETS
from tests import diffusion

BEAMS = Sampling(max_new_tokens=16, temperature=0, beams=3)
DRAWN = Sampling(max_new_tokens=16, temperature=1.2, top_p=0.95, repetition_penalty=1.3, seed=4)
QUICK = Sampling(steps=3, guidance=4.0, seed=2)
MIX: Row = {"one": 0.6, "two": -0.8}
WHO: list[Row] = [None, "one", "two", MIX]


def written(folder: Path, base: nn.Module, config: AdapterConfig, size: float) -> Path:
    """An adapter of random values for a base, which is left as it was."""
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(sum(map(ord, folder.name)))
    with torch.no_grad():
        for parameter in model.adapter_parameters().values():
            parameter += torch.randn(parameter.shape, generator=generator) * size
    save_adapter(model, folder)
    model.unload()
    return folder


def attached(answerer: Any, base: nn.Module, folder: Path, configs: Mapping[str, AdapterConfig], size: float) -> Any:
    """The answerer with adapters of these configs under their names."""
    places = {name: written(folder / name, base, config, size) for name, config in configs.items()}
    for name, place in places.items():
        answerer.attach(name, place)
    return answerer


def asked(answerer: Any, message: dict[str, str], who: list[Row], sampling: Sampling) -> list[Any]:
    """Each column's words with their reason, or its picture; one finished piece a column, in order."""
    pieces = list(answerer.stream([message], who, sampling))
    assert [piece.index for piece in pieces] == list(range(len(who))) and all(piece.done for piece in pieces)
    return [(piece.text, piece.reason) if piece.picture is None else pixels(piece.picture) for piece in pieces]


def alone(answerer: Any, message: dict[str, str], who: list[Row], sampling: Sampling) -> list[Any]:
    return [asked(answerer, message, [row], sampling)[0] for row in who]


def switched(answerer: Any, message: dict[str, str], row: Row, sampling: Sampling) -> Any:
    """What the model answers without rows, and so without stacks, when the switchboard holds the row's adapters."""
    weights = dict(mix_of(row))
    with Blender().applied(answerer.parts, Blend(weights)):
        (piece,) = answerer.as_switched([message], list(weights), sampling)
    return (piece.text, piece.reason) if piece.picture is None else pixels(piece.picture)


def pixels(picture: Any) -> Any:
    return np.asarray(picture).astype(int)


@contextmanager
def counted(module: nn.Module, name: str = "") -> Iterator[list[int]]:
    """The batch's length at each call of a module, read off its first input or the one that is named."""
    seen: list[int] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(len(named[name] if name else inputs[0]))

    hook = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def stacked(model: Any) -> bool:
    return any(isinstance(layer, AdapterLayer) and layer.stack._made for _, layer in model.wrappers())


def test_kinds_stand_together_and_none_is_lost() -> None:
    assert list(batches("abacab", 2)) == [[0, 2], [4], [1, 5], [3]]
    assert list(batches([])) == [] and list(batches([None] * 9)) == [[0, 1, 2, 3, 4, 5, 6, 7], [8]]


# --- words -----------------------------------------------------------------------------------------------------------

THOU = {"content": "modernise: And thou shalt say unto them, Ye have sinned a great sin: and now I will go up."}


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    answerer = Answerer("tiny-t5", "fp32")
    everywhere = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    configs: dict[str, AdapterConfig] = {
        "one": LoraConfig(r=3, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"),
        "two": LoraConfig(r=7, lora_alpha=16, target_modules=everywhere, task_type="SEQ_2_SEQ_LM"),
        "ia3": IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"], task_type="SEQ_2_SEQ_LM"),
        "dora": LoraConfig(r=2, use_dora=True, target_modules=["o", "q"], task_type="SEQ_2_SEQ_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
        "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_2_SEQ_LM"),
    }
    folder = tmp_path_factory.mktemp("t5")
    found = attached(answerer, answerer.model, folder, configs, 0.12)
    # Words of its own before each prompt, so that the encoder's rows are of unequal length.
    Seq2Seq(prefix="repeat: ").save(folder / "dora")
    assert isinstance(found, Answerer)
    return found


@pytest.mark.parametrize("sampling", [BEAMS, DRAWN], ids=["beams", "drawn"])
def test_translations_are_those_that_columns_give_alone(translator: Answerer, sampling: Sampling) -> None:
    who: list[Row] = [*WHO, "dora", "ia3", "prompt", {"prefix": 1.0, "one": 0.5}]
    model: Any = translator.model
    with counted(model.get_base_model().encoder.block[0]) as encoded:
        together = asked(translator, THOU, who, sampling)
    assert encoded == [len(who)]
    assert together == alone(translator, THOU, who, sampling)
    assert together[1:4] == [switched(translator, THOU, row, sampling) for row in who[1:4]]
    assert len({text for text, _ in together}) >= 6


def test_the_loras_of_a_translation_are_stacked_for_all_beams(translator: Answerer) -> None:
    model: Any = translator.model
    first = model.get_base_model().decoder.block[0].layer[0].SelfAttention.q
    with counted(first) as beams:
        asked(translator, THOU, WHO, BEAMS)
    assert set(beams) == {4 * 3} and stacked(model)


def test_a_draw_depends_on_no_neighbour_and_on_its_seed(translator: Answerer) -> None:
    same = asked(translator, THOU, ["two", None, "two", "two"], DRAWN)
    assert same[0] == same[2] == same[3] != same[1]
    other = Sampling(max_new_tokens=16, temperature=1.2, top_p=0.95, seed=5)
    assert asked(translator, THOU, ["two"], other)[0] != same[0]


def test_a_translation_that_is_cut_beside_one_that_ends(translator: Answerer) -> None:
    dog = {"content": "modernise: Thou hast a good dog."}
    found = asked(translator, dog, WHO, BEAMS)
    assert found[0] == ("You have a good dog.", "stop") and {reason for _, reason in found} == {"stop", "length"}
    assert found == alone(translator, dog, WHO, BEAMS)


def test_an_empty_prompt_is_refused(translator: Answerer) -> None:
    with pytest.raises(PromptError, match="empty"):
        asked(translator, {"content": " "}, WHO, BEAMS)


def test_rows_that_a_base_cannot_align_stand_apart(translator: Answerer) -> None:
    """BART takes no positions, so columns with unequal numbers of virtual tokens cannot share a batch."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=translator.model.config.vocab_size,  # type: ignore[union-attr]
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        init_std=0.4,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=1,
    )
    model = get_peft_model(
        BartForConditionalGeneration(config), LoraConfig(r=2, task_type="SEQ_2_SEQ_LM", init_lora_weights=False), "lora"
    )
    for count in (3, 5):
        model.add_adapter(f"p{count}", PromptTuningConfig(num_virtual_tokens=count, task_type="SEQ_2_SEQ_LM"))
    who: list[Row] = [None, "p3", "lora", {"p5": 1.0, "lora": 1.0}, "p3"]
    prompts = ["a short one", "another that is longer", "a short one", "the fourth", "and the last of them all"]
    with counted(model.get_base_model().model.encoder.layers[0]) as encoded:  # type: ignore[union-attr,operator]
        found = list(answers(model, translator.tokenizer, prompts, who, BEAMS))
    assert encoded == [2, 2, 1] and sorted(piece.index for piece in found) == list(range(5))
    texts = {piece.index: piece.text for piece in found}
    for number, row in enumerate(who):
        assert texts[number] == write(model, translator.tokenizer, prompts[number], BEAMS, row)[0]
    assert len(set(texts.values())) >= 4


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture() -> dict[str, str]:
    return {"image": load(REPOSITORY / "examples" / "emoji_grounds.zip").examples[0]["image"]}


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    answerer = Captioner("tiny-blip", "fp32")
    configs: dict[str, AdapterConfig] = {
        "one": LoraConfig(r=2, target_modules=["query", "value"]),
        "two": LoraConfig(r=5, lora_alpha=12, target_modules=r"text_decoder.*\.(query|key|dense)"),
        "seeing": LoraConfig(r=3, target_modules=["qkv", "value"]),
        "styled": LoraConfig(r=4, target_modules=["query", "key"]),
    }
    folder = tmp_path_factory.mktemp("blip")
    found = attached(answerer, answerer.model, folder, configs, 0.3)
    Captioning(style="artistic").save(folder / "styled")
    assert isinstance(found, Captioner)
    return found


@pytest.mark.parametrize("sampling", [BEAMS, DRAWN], ids=["beams", "drawn"])
def test_captions_are_those_that_columns_give_alone(
    captioner: Captioner, picture: dict[str, str], sampling: Sampling
) -> None:
    model: Any = captioner.model
    base = model.get_base_model()
    who: list[Row] = [*WHO, "styled", {"styled": 0.5, "one": 1.0}]
    with (
        counted(base.vision_model, "pixel_values") as looked,
        counted(base.text_decoder.bert.encoder.layer[0].attention.self.query) as said,
    ):
        together = asked(captioner, picture, who, sampling)
    beams = 1 if sampling.temperature else sampling.beams
    assert looked == [1] and set(said) == {4 * beams, 2 * beams} and stacked(model)
    assert together == alone(captioner, picture, who, sampling)
    assert together[1:4] == [switched(captioner, picture, row, sampling) for row in who[1:4]]
    assert len({text for text, _ in together}) >= 5


def test_an_adapter_that_changes_how_the_model_sees_has_a_row_of_its_own(
    captioner: Captioner, picture: dict[str, str]
) -> None:
    model: Any = captioner.model
    who: list[Row] = [None, "seeing", {"seeing": 0.5, "two": 1.0}, "one"]
    with counted(model.get_base_model().vision_model, "pixel_values") as looked:
        together = asked(captioner, picture, who, BEAMS)
    assert looked == [4] and together == alone(captioner, picture, who, BEAMS)
    assert len({text for text, _ in together}) >= 3
    # What is seen for others is not kept from this, nor the other way round.
    assert asked(captioner, picture, ["one", None], BEAMS) == [together[3], together[0]]


# --- pictures --------------------------------------------------------------------------------------------------------

APPLE = {"content": "a red apple"}


def drawers(xl: bool, folder: Path) -> Painter:
    """Adapters of linear layers and convolutions; two of them with parts for the text encoders."""
    base = str(diffusion.save_pipeline(folder / "sd", xl=True)) if xl else "tiny-sd"
    painter = Painter(base, "fp32")
    encoders = painter.pipeline.named_encoders
    kinds: dict[str, tuple[AdapterConfig, int | None]] = {
        "one": (LoraConfig(r=3, target_modules=["to_q", "to_v"]), None),
        "two": (LoraConfig(r=6, lora_alpha=12, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"]), 2),
        "three": (LoraConfig(r=4, use_dora=True, target_modules=["to_k", "ff.net.2", "conv_in"]), 5),
        "four": (IA3Config(target_modules=["to_k", "to_v", "ff.net.2"], feedforward_modules=["ff.net.2"]), None),
    }
    for name, (config, rank) in kinds.items():
        place = written(
            folder / name, painter.pipeline.unet, config, {"four": 1.0 if xl else 0.4}.get(name, 0.2 if xl else 0.1)
        )
        for part, encoder in encoders.items():
            if rank is not None:
                written(place / part, encoder, LoraConfig(r=rank, target_modules=list(TARGETS)), 0.3)
    for name in kinds:
        painter.attach(name, folder / name)
    if xl:
        exact(painter)
    return painter


def exact(painter: Painter) -> None:
    """In float64: random weights with large adapters make much of each rounding."""
    for model in (painter.pipeline.unet, painter.pipeline.vae, *painter.pipeline.encoders):
        model.double()


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "xl"])
def painter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Painter:
    return drawers(request.param, tmp_path_factory.mktemp("drawers"))


@pytest.mark.parametrize("guidance", [4.0, 1.0], ids=["guided", "plain"])
def test_pictures_are_those_that_columns_give_alone(painter: Painter, guidance: float) -> None:
    who: list[Row] = [*WHO, "three", {"three": 0.5, "four": 1.0}, "four"]
    sampling = Sampling(steps=3, guidance=guidance, seed=2)
    with (
        counted(painter.pipeline.unet) as looked,
        counted(painter.pipeline.encoders[0]) as read,
    ):
        together = asked(painter, APPLE, who, sampling)
    assert looked == [len(who) * (2 if guidance > 1 else 1)] * 3 and set(read) == {len(who)}
    assert stacked(painter.model) and stacked(painter.models["text_encoder"])
    for row, one, other in zip(who, together, alone(painter, APPLE, who, sampling), strict=True):
        assert np.abs(one - other).max() <= 1, row
    for row, one in list(zip(who, together, strict=True))[1:]:
        assert np.abs(one - switched(painter, APPLE, row, sampling)).max() <= 1, row
    for number, one in enumerate(together):
        assert all(np.abs(one - other).max() > 2 for other in together[:number]), who[number]
    # Nothing of a batch stays.
    assert all(model.switchboard.rows is None for model in painter.models.values())
    assert not painter.pipeline.unet._forward_pre_hooks


def test_a_combination_is_a_row_like_any_other_and_the_base_is_the_base(painter: Painter) -> None:
    attach_blend(painter, Blend({"one": 0.6, "two": -0.8}, "cat"), "both")
    try:
        plain, mixed, both = asked(painter, APPLE, [None, MIX, "both"], QUICK)
        assert np.abs(mixed - both).max() <= 1
    finally:
        painter.detach("both")
    untouched = Painter(str(painter.pipeline.unet.name_or_path), "fp32")
    if painter.pipeline.xl:
        exact(untouched)
    assert np.abs(asked(untouched, APPLE, [None], QUICK)[0] - plain).max() <= 1


def test_large_pictures_are_drawn_one_after_another_on_a_cpu(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painting, "CPU_SIDE", painter.pipeline.side // painter.pipeline.scale - 1)
    with counted(painter.pipeline.unet) as looked:
        stream = painter.stream([APPLE], WHO, QUICK)
        first = next(stream)
    # The first is there before the second is begun.
    assert first.index == 0 and looked == [2] * QUICK.steps
    stream.close()


def test_a_batch_that_an_accelerator_has_no_room_for_is_halved(painter: Painter) -> None:
    room, tried = [3], []

    def full(unet: nn.Module, inputs: tuple[Any, ...]) -> None:
        tried.append(len(inputs[0]) // 2)
        if tried[-1] > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    expected = alone(painter, APPLE, WHO, QUICK)
    hook = painter.pipeline.unet.register_forward_pre_hook(full)
    try:
        found = asked(painter, APPLE, WHO, QUICK)
        assert tried == [4, *[2] * 2 * QUICK.steps]
        for one, other in zip(found, expected, strict=True):
            assert np.abs(one - other).max() <= 1
        room[0] = 0
        with pytest.raises(torch.OutOfMemoryError):
            asked(painter, APPLE, WHO, QUICK)
    finally:
        hook.remove()
    assert all(model.switchboard.rows is None for model in painter.models.values())
