"""How long adapters take to attach, load, mix, switch, merge and answer side by side; PEFT beside us in one process.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m bench.instant [--rounds 5] [--only WORD] [--json FILE]

Each row times ours and the peer in turns, after one call of each that does not count. Seconds are CPU time of the
process, which other programs on the machine disturb least; with one thread it is what an idle machine would take.
"""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import measuring

ROUNDS = 5
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEW_TOKENS, COLUMNS, LOADED = 24, 8, 40
LIVE_SECONDS = 0.002
"""What a live mix may take, whatever the peer takes."""
PROMPT = [{"role": "user", "content": "Write a long story about a dog that crosses the sea."}]
Step = tuple[Callable[[], Any], Callable[[], Any]]
"""(what is timed, what puts the model back afterwards)."""


def nothing() -> None:
    """Nothing has to be put back."""


def row(name: str, ours: Step, peer: Step, target: float, rounds: int, seconds: float | None = None) -> dict[str, Any]:
    """A row of CPU seconds; with `seconds` the target is that time, as a share of the peer's."""

    def once(side: Step) -> Callable[[], float]:
        def run() -> float:
            gc.collect()
            took = measuring.timed(side[0]).cpu
            side[1]()
            return took

        return run

    mine, theirs = (times[1:] for times in measuring.in_turns(once(ours), once(peer), rounds + 1))
    found = measuring.row(name, mine, theirs, target, "s")
    if seconds is not None:
        found |= {"target": seconds / found["peer"], "note": f"the target is {seconds * 1e3:g} ms"}
    return found


def llama(layers: int, width: int, inner: int, vocabulary: int) -> Any:
    """A Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": max(width // 192, 1)}
    shape = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True)).eval()


def shaped() -> Any:
    """A Llama of SmolLM2-135M's shape: 210 linear layers."""
    return llama(30, 576, 1536, 49152)


def attaching(rounds: int) -> Iterator[dict[str, Any]]:
    import peft

    import engine

    mine, theirs = llama(48, 64, 160, 256), llama(48, 64, 160, 256)
    held: dict[str, Any] = {}

    def attach(library: Any, model: Any, side: str) -> Step:
        config = library.LoraConfig(r=8, target_modules=ALL)
        return (
            lambda: held.update({side: library.get_peft_model(model, config)}),
            lambda: held.pop(side).unload(),
        )

    yield row("attach to 336 linears", attach(engine, mine, "ours"), attach(peft, theirs, "peer"), 1 / 20, rounds)


def files(folder: Path, count: int) -> list[Path]:
    """Adapters of rank 8 on every linear layer, as they lie on a disk (5 MB in half precision, 10 MB here)."""
    import torch

    import engine

    model = engine.get_peft_model(shaped(), engine.LoraConfig(r=8, target_modules=ALL, init_lora_weights=False))
    with torch.no_grad():
        for parameter in model.adapter_parameters().values():
            parameter *= 0.1
    for number in range(count):
        model.save_pretrained(folder / f"a{number}")
    return [folder / f"a{number}" for number in range(count)]


def loading(rounds: int) -> Iterator[dict[str, Any]]:
    """The 40th adapter; then what is done with adapters that are there."""
    import peft

    import engine

    with tempfile.TemporaryDirectory() as folder:
        (path,) = files(Path(folder), 1)
        mine = engine.PeftModel.from_pretrained(shaped(), path, "a0")
        theirs = peft.PeftModel.from_pretrained(shaped(), path, "a0")
        for model in (mine, theirs):
            for number in range(1, LOADED - 1):
                model.load_adapter(path, adapter_name=f"a{number}")

        def load(model: Any) -> Step:
            return (lambda: model.load_adapter(path, adapter_name="last"), lambda: model.delete_adapter("last"))

        yield row("load the 40th adapter", load(mine), load(theirs), 1 / 40, rounds)


def using(rounds: int) -> Iterator[dict[str, Any]]:
    import peft

    import engine

    with tempfile.TemporaryDirectory() as folder:
        (path,) = files(Path(folder), 1)
        mine = engine.PeftModel.from_pretrained(shaped(), path, "a0")
        theirs = peft.PeftModel.from_pretrained(shaped(), path, "a0")
        for model in (mine, theirs):
            model.load_adapter(path, adapter_name="a1")

        def mix(model: Any, how: str) -> Step:
            def step() -> None:
                model.add_weighted_adapter(["a0", "a1"], [0.7, 0.3], "mix", combination_type=how, svd_rank=8)

            return (step, lambda: model.delete_adapter("mix"))

        live: Step = (
            lambda: mine.set_adapter_weights({"a0": 0.7, "a1": 0.3}),
            lambda: mine.set_adapter_weights({"a0": 1.0}),
        )
        yield row("mix two adapters live (PEFT: linear)", live, mix(theirs, "linear"), 0, rounds, LIVE_SECONDS)
        yield row("mix two adapters by svd", mix(mine, "svd"), mix(theirs, "svd"), 1 / 50, rounds)

        def switch(model: Any) -> Step:
            return (lambda: model.set_adapter("a1"), lambda: model.set_adapter("a0"))

        yield row("switch between two adapters", switch(mine), switch(theirs), 1.0, rounds)

        def merge(model: Any) -> Step:
            return (model.merge_adapter, model.unmerge_adapter)

        yield row("merge", merge(mine), merge(theirs), 1.0, rounds)
        yield row("unmerge", *((u, m) for m, u in (merge(mine), merge(theirs))), 1.0, rounds)

        held: dict[str, Any] = {"ours": mine, "peer": theirs}

        def strip(side: str, library: Any, call: str) -> Step:
            def back() -> None:
                held[side] = library.PeftModel.from_pretrained(held.pop("base"), path, "a0")

            return (lambda: held.update(base=getattr(held[side], call)()), back)

        for call, name in (("merge_and_unload", "merge and unload"), ("unload", "unload")):
            yield row(name, strip("ours", engine, call), strip("peer", peft, call), 1.0, rounds)


def answering(rounds: int) -> Iterator[dict[str, Any]]:
    """Eight adapters answer one prompt; the limit is the base alone at that batch, in the same decoding loop."""
    import torch

    import engine
    from engine.generation import Sampling, decode, encode_prompt
    from engine.models.loading import load_causal_lm

    base, tokenizer = load_causal_lm("smollm2-135m-instruct", precision="fp32")
    ids, sampling = encode_prompt(tokenizer, PROMPT), Sampling(max_new_tokens=NEW_TOKENS, temperature=0)
    names = [f"a{number}" for number in range(COLUMNS)]

    def many(library: Any, targets: list[str]) -> Any:
        model: Any = None
        carrier, _ = load_causal_lm("smollm2-135m-instruct", precision="fp32")
        config = library.LoraConfig(r=8, target_modules=targets, init_lora_weights=False)
        torch.manual_seed(0)
        for name in names:
            if model is None:
                model = library.get_peft_model(carrier, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter *= 0.1
        return model.eval()

    def decoded(model: Any, who: list[Any]) -> Step:
        def step() -> None:
            for piece in decode(model, tokenizer, ids, who, sampling):
                assert piece.reason != "stop", "an answer ended early, so that the times could not be compared"

        return (step, nothing)

    def generated(model: Any) -> Step:
        batch = ids.expand(COLUMNS, -1)
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

        @torch.no_grad()
        def step() -> None:
            model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), adapter_names=names, **length)

        return (step, nothing)

    for targets, words in ((["q_proj", "v_proj"], "q and v"), (ALL, "all linears")):
        what = f"8 adapters on {words}, {NEW_TOKENS} tokens"
        model = many(engine, targets)
        ours = decoded(model, names)
        yield row(f"{what} (the base alone)", ours, decoded(base, [None] * COLUMNS), 1.2, rounds)
        import peft

        yield row(f"{what} (PEFT's mixed batch)", ours, generated(many(peft, targets)), 1.0, rounds)
    grid = [{names[0]: share / 8, names[1]: 1 - share / 8} for share in range(COLUMNS)]
    what = f"8 mixes of 2 adapters on all linears, {NEW_TOKENS} tokens"
    alone = decoded(base, [None] * COLUMNS)
    yield row(f"{what} (the base alone)", decoded(model, grid), alone, 1.2, rounds)


def columns(rounds: int) -> Iterator[dict[str, Any]]:
    """Columns of the other families."""
    from bench.columns import families

    yield from families(rounds)


GROUPS: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "attach": attaching,
    "load": loading,
    "use": using,
    "answer": answering,
    "columns": columns,
}


def rows(rounds: int = ROUNDS, only: str = "") -> list[dict[str, Any]]:
    """Every row, or those of the group `only`."""
    found: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, group in GROUPS.items():
            if not only or only == name:
                found += group(rounds)
                gc.collect()
    return found


if __name__ == "__main__":
    measuring.command_line(
        __doc__,
        rows,
        ("--rounds", {"type": int, "default": ROUNDS}),
        ("--only", {"choices": tuple(GROUPS), "default": ""}),
    )
