"""Virtual tokens: what they start from, their files, and runs that train and use them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from engine.errors import CheckpointError, ConfigError
from engine.generation import Answerer, Sampling
from tests import tiny
from tests.test_generation import texts
from tests.test_prompts import CONFIGS, fresh, params
from tests.test_train import ROOT, data, job, losses, train  # noqa: F401 (data is a fixture)

# --- starts and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["다음은 고품질 응답입니다:", "The following is an answer."])
def test_starting_from_a_text(text: str, tmp_path: Path) -> None:
    from engine.models.loading import load_causal_lm

    base, tokenizer = load_causal_lm("tiny-llama", precision="fp32")
    ids = tokenizer(text)["input_ids"]
    for count in (2, 40):
        config = PromptTuningConfig(
            prompt_tuning_init="TEXT", prompt_tuning_init_text=text, num_virtual_tokens=count,
            tokenizer_name_or_path="tiny-llama",
        )  # fmt: skip
        model = get_peft_model(base, config)
        expected = base.get_input_embeddings().weight[torch.tensor((ids * 40)[:count])]
        assert torch.equal(model.prompts["default"](), expected)
        base = model.unload()
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (plain["prompt_tuning_init"], plain["prompt_tuning_init_text"]) == ("TEXT", text)
    plain["tokenizer_name_or_path"] = "not/there-at-all"
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain), encoding="utf-8")
    # Loading draws no start, so it needs no tokenizer.
    PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True)


def test_starting_from_the_vocabulary() -> None:
    model = get_peft_model(tiny.llama(), PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", num_virtual_tokens=6))
    words = model.get_input_embeddings().weight
    assert all((row == words).all(1).any() for row in model.prompts["default"]())


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    def text(**more: Any) -> PromptTuningConfig:
        return PromptTuningConfig(prompt_tuning_init="TEXT", **more)

    with pytest.raises(ConfigError, match="prompt_tuning_init_text is empty"):
        text()
    with pytest.raises(ConfigError, match="Set tokenizer_name_or_path"):
        get_peft_model(tiny.llama(), text(prompt_tuning_init_text="Answer"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        get_peft_model(tiny.llama(), text(prompt_tuning_init_text="Answer", tokenizer_name_or_path=str(tmp_path)))
    with pytest.raises(ConfigError, match="the base knows 64"):
        get_peft_model(tiny.llama(), text(prompt_tuning_init_text="Zebra", tokenizer_name_or_path="tiny-llama"))
    with pytest.raises(ConfigError, match="tokenizer_kwargs"):
        PromptTuningConfig(tokenizer_kwargs={"use_fast": True})


@pytest.mark.parametrize("projected", [False, True], ids=["p-tuning", "prefix"])
def test_training_goes_on_from_a_saved_encoder(projected: bool, tmp_path: Path) -> None:
    if projected:
        config: Any = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8)
    else:
        config = PromptEncoderConfig(
            num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", encoder_dropout=0.5
        )
    model = tiny.shake(get_peft_model(tiny.llama(), config)).train()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    mine, other = model.adapter_parameters(), again.adapter_parameters()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) and other[key].requires_grad for key in mine)
    frozen = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(frozen), tiny.logits(model.eval()))
    engine.set_peft_model_state_dict(frozen, engine.get_peft_model_state_dict(model))
    assert frozen.adapter_parameters().keys() == mine.keys()


def test_an_encoder_that_does_not_belong_here(tmp_path: Path) -> None:
    fresh("encoder").save_pretrained(tmp_path / "one")
    fresh("encoder", size=0.5).save_pretrained(tmp_path / "two")
    one, two = (tmp_path / name / "prompt_encoder.safetensors" for name in ("one", "two"))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    with pytest.warns(UserWarning, match="other virtual tokens"):
        model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "one", is_trainable=True)
    assert list(model.adapter_parameters()) == ["prompt_encoder.prompt_embeddings"]
    one.write_bytes(kept[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "one")
    wide = get_peft_model(tiny.llama(), CONFIGS["encoder"].replace(encoder_hidden_size=5))
    wide.save_pretrained(tmp_path / "wide")
    one.write_bytes((tmp_path / "wide" / "prompt_encoder.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="does not fit its config"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "one")
    fresh("prompt").save_pretrained(tmp_path / "p")
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 9}))
    with pytest.raises(CheckpointError, match="has shape"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "p")


def test_a_bf16_base_keeps_fp32_masters() -> None:
    for kind in CONFIGS:
        model = tiny.shake(get_peft_model(tiny.llama().bfloat16(), CONFIGS[kind]))
        assert all(p.dtype == torch.float32 for p in params(model, "default"))
        assert tiny.logits(model).dtype == torch.bfloat16
        tiny.logits(model).float().square().mean().backward()
        assert all(p.grad is not None for p in params(model, "default"))


# --- runs ----------------------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[dict[str, Any], float]] = {
    "prompt_tuning": ({"num_virtual_tokens": 8, "prompt_tuning_init": "SAMPLE_VOCAB"}, 0.05),
    "p_tuning": ({"num_virtual_tokens": 8, "encoder_hidden_size": 64}, 0.01),
    "prefix_tuning": ({"num_virtual_tokens": 8}, 0.03),
}


def spec(data: Path, method: str, **training: Any) -> Any:  # noqa: F811
    fields, rate = RUNS[method]
    plain = job(data, **{"max_steps": 12, "eval_every": 12, "learning_rate": rate, **training})
    return engine.JobSpec.from_dict(plain.to_dict() | {"adapter": {"method": method, **fields}})


@pytest.mark.parametrize("method", list(RUNS))
def test_a_run_learns_and_its_adapter_answers(method: str, data: Path, tmp_path: Path) -> None:  # noqa: F811
    state, recorder = train(spec(data, method, sample_prompts=["Say a word."]), tmp_path / "run")
    done = recorder.of("done")[0]
    assert state == "done" and done["eval_loss"] < 0.9 * done["first_eval_loss"]
    assert len(recorder.of("sample")) == 2
    command = ["-m", "engine", "generate", "--model", "tiny-llama", "--adapter", str(tmp_path / "run" / "adapter")]
    command += ["--prompt", "Say the word number 3 of the list.", "--max-new-tokens", "12", "--json"]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    base, tuned = (json.loads(line) for line in result.stdout.splitlines())
    assert base["text"] != tuned["text"]


@pytest.mark.parametrize("method", ["p_tuning", "prefix_tuning"])
def test_a_resumed_run_is_the_uninterrupted_one(method: str, data: Path, tmp_path: Path) -> None:  # noqa: F811
    class Pause:
        calls = 0

        def poll(self) -> str | None:
            self.calls += 1
            return "pause" if self.calls == 5 else None

    settings = {"max_steps": 8, "eval_every": 100}
    _, whole = train(spec(data, method, **settings), tmp_path / "whole")
    state, first = train(spec(data, method, **settings), tmp_path / "parts", Pause())
    assert state == "paused"
    _, second = train(spec(data, method, **settings), tmp_path / "parts", resume=True)
    both = losses(first) | losses(second)
    assert both.keys() == losses(whole).keys()
    assert all(abs(both[step] - loss) < 1e-4 for step, loss in losses(whole).items())


def test_columns_with_virtual_tokens_beside_others(tmp_path: Path) -> None:
    from engine.models.loading import load_causal_lm

    answerer = Answerer("tiny-llama", "fp32")
    names: list[str | None] = [None]
    for name, config in {**CONFIGS, "lora": LoraConfig(target_modules="all-linear")}.items():
        base, _ = load_causal_lm("tiny-llama", precision="fp32")
        tiny.shake(get_peft_model(base, config), 0.1 if name == "lora" else 3.0).save_pretrained(tmp_path / name)
        answerer.attach(name, tmp_path / name)
        names.append(name)
    sampling = Sampling(max_new_tokens=10, temperature=0.0)
    together = texts(answerer, names, sampling)
    assert [texts(answerer, [name], sampling)[0] for name in names] == together
    assert len(set(together)) > 2
    for name in names[1:]:
        answerer.detach(str(name))
    assert texts(answerer, [None], sampling)[0] == together[0]
