"""Answering side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import LoraConfig, get_peft_model
from engine.errors import CheckpointError, ConfigError, PromptError
from engine.generation import Answerer, Sampling, decode, encode_prompt, pick
from engine.models.loading import load_causal_lm
from tests import tiny

QUESTION = [{"role": "user", "content": "What is a dog?"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, size in (("one", 0.06), ("two", 0.12)):
        base, _ = load_causal_lm("tiny-llama", precision="fp32")
        model = tiny.shake(get_peft_model(base, LoraConfig(target_modules="all-linear")), size)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def texts(answerer: Answerer, who: list[str | None], sampling: Sampling) -> list[str]:
    found, done = [""] * len(who), [False] * len(who)
    for piece in answerer.stream(QUESTION, who, sampling):
        assert not done[piece.index]
        found[piece.index] += piece.text
        done[piece.index] = piece.done
    assert all(done)
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_columns_do_not_depend_on_their_neighbours(temperature: float, folders: dict[str, Path]) -> None:
    answerer = Answerer("tiny-llama", "fp32")
    sampling = Sampling(max_new_tokens=12, temperature=temperature, seed=5)
    base = texts(answerer, [None], sampling)[0]
    for name, folder in folders.items():
        answerer.attach(name, folder)
    together = texts(answerer, [None, "one", "two"], sampling)
    assert together[0] == base
    assert [texts(answerer, [who], sampling)[0] for who in (None, "one", "two")] == together
    assert len(set(together)) > 1
    answerer.detach("one")
    assert answerer.attached == ("two",)
    assert texts(answerer, ["two"], sampling)[0] == together[2]
    answerer.detach("two")
    assert texts(answerer, [None], sampling)[0] == base
    with pytest.raises(ConfigError, match="no adapter 'one'"):
        texts(answerer, ["one"], sampling)


def test_greedy_is_transformers_greedy() -> None:
    model, tokenizer = load_causal_lm("tiny-llama", precision="fp32")
    ids = encode_prompt(tokenizer, QUESTION)
    ours = "".join(p.text for p in decode(model, tokenizer, ids, [], Sampling(max_new_tokens=20, temperature=0)))
    theirs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert ours == tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)
    seen = torch.tensor([0])

    def draw(**settings: float) -> list[float]:
        sampling = Sampling(temperature=1.0, **settings)  # type: ignore[arg-type]
        counts = torch.bincount(
            torch.tensor([pick(logits, seen, sampling, generator) for _ in range(4000)]), minlength=4
        )
        return (counts / 4000).tolist()

    assert draw(top_p=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert draw(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert draw(top_p=1.0, top_k=1) == [1, 0, 0, 0]
    assert pick(logits, seen, Sampling(temperature=0, repetition_penalty=3.0), generator) == 1


def test_prompts_that_cannot_be_answered() -> None:
    answerer = Answerer("tiny-llama", "fp32")
    with pytest.raises(PromptError, match="context holds"):
        list(answerer.stream([{"role": "user", "content": "word " * 4000}], [None], Sampling()))
    with pytest.raises(PromptError, match="empty"):
        list(answerer.stream([{"role": "user", "content": "  "}], [None], Sampling()))
    with pytest.raises(ConfigError) as caught:
        Sampling(temperature=-1, top_p=0)
    assert str(caught.value).count("\n- ") == 2


def test_a_refused_adapter_leaves_the_base(tmp_path: Path) -> None:
    get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    answerer = Answerer("tiny-llama", "fp32")
    before = texts(answerer, [None], Sampling(max_new_tokens=5, temperature=0))
    with pytest.raises(CheckpointError):
        answerer.attach("foreign", tmp_path)
    assert answerer.attached == ()
    assert texts(answerer, [None], Sampling(max_new_tokens=5, temperature=0)) == before
