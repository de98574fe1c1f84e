"""PEFT's other calls and arguments, against PEFT where it has the same; transformers' Trainer."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification, Trainer, TrainingArguments

import engine
from engine import AdapterTrainer, LoraConfig, PeftModel, get_peft_model
from engine.errors import CheckpointError, ConfigError, UnsafeFileError
from tests import tiny

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def shaken(model: Any) -> Any:
    """The model with an adapter that changes something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def ours(**changes: Any) -> PeftModel:
    return shaken(get_peft_model(tiny.llama(), LoraConfig(**{**LORA, **changes})))


def test_arguments_of_pefts_loading_and_saving(tmp_path: Path) -> None:
    model = ours()
    wanted = tiny.logits(model.eval())
    model.save_pretrained(tmp_path / "below" / "a", safe_serialization=True, is_main_process=True)
    for more in (
        {"torch_device": "cpu", "low_cpu_mem_usage": True},
        {"device_map": "cpu", "torch_dtype": torch.float32},
        {"config": LoraConfig(**LORA)},
    ):
        again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "below" / "a", **more)
        assert torch.equal(tiny.logits(again), wanted)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "below", subfolder="a")
    again.load_adapter(tmp_path / "below", "b", subfolder="a", torch_device="cpu")
    again.set_adapter("b")
    assert torch.equal(tiny.logits(again), wanted)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(UnsafeFileError, match="safetensors only"):
        model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(TypeError, match="torch_devise"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "below" / "a", torch_devise="cpu")
    with pytest.raises(ConfigError, match="revision is 'v2'"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "below" / "a", revision="v2")


def test_a_loaded_adapter_trains_after_set_adapter_as_in_peft(tmp_path: Path) -> None:
    ours().save_pretrained(tmp_path)
    kinds = ((PeftModel, LoraConfig), (peft.PeftModel, peft.LoraConfig))
    found = []
    for model_class, _ in kinds:
        model = model_class.from_pretrained(tiny.llama(), tmp_path)
        flags = [any(p.requires_grad for p in model.parameters())]
        model.load_adapter(tmp_path, "b")
        flags.append(any(p.requires_grad for p in model.parameters()))
        model.set_adapter("b")
        flags.append(any(p.requires_grad for p in model.parameters()))
        found.append(flags)
    assert found[0] == found[1] == [False, False, True]


def test_layers_and_the_base_model_answer_by_pefts_names() -> None:
    model, theirs = ours(), shaken(peft.get_peft_model(tiny.llama(), peft.LoraConfig(**LORA)))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    other = theirs.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == other.lora_A["default"].weight.shape
    assert layer.scaling == other.scaling and layer.r == other.r
    assert layer.active_adapters == other.active_adapters and layer.merged_adapters == other.merged_adapters == []
    change = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(layer.get_delta_weight("default"), change, atol=1e-7)
    assert layer.in_features == other.in_features
    with pytest.raises(AttributeError, match="lora_Q"):
        _ = layer.lora_Q
    assert not hasattr(layer, "weight_format_of_nobody")
    base = tiny.logits(tiny.llama())
    adapted = tiny.logits(model.eval())
    model.base_model.disable_adapter_layers()
    assert torch.equal(tiny.logits(model), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(tiny.logits(model), adapted)
    model.base_model.merge_adapter(safe_merge=True)
    assert (tiny.logits(model) - adapted).abs().max() < 1e-5
    model.base_model.unmerge_adapter()
    assert (
        tiny.logits(model.base_model.merge_and_unload(progressbar=True, safe_merge=True)) - adapted
    ).abs().max() < 1e-5


def test_a_copy_calls_itself_and_no_cycle_keeps_weights_in_memory() -> None:
    model = ours()
    twin = copy.deepcopy(model)
    twin.base_model.merge_adapter()
    assert not model.merged_layers() and twin.merged_layers()
    again = pickle.loads(pickle.dumps(ours()))
    again.base_model.disable_adapter_layers()
    assert again.switchboard.disabled
    weight = weakref.ref(model.base_model.model.lm_head)
    gc.disable()
    try:
        del model, twin
        assert weight() is None
    finally:
        gc.enable()


def test_status_says_what_pefts_says() -> None:
    model, theirs = ours(), peft.get_peft_model(tiny.llama(), peft.LoraConfig(**LORA))
    for one in (model, theirs):
        one.add_adapter(
            "b", (LoraConfig if one is model else peft.LoraConfig)(**{**LORA, "target_modules": ["q_proj"]})
        )
    mine, other = engine.get_model_status(model), peft.get_model_status(theirs)
    for name in (
        "trainable_params",
        "num_adapter_layers",
        "enabled",
        "active_adapters",
        "merged_adapters",
        "requires_grad",
        "devices",
        "base_model_type",
    ):
        assert getattr(mine, name) == getattr(other, name), name
    for a, b in zip(engine.get_layer_status(model), peft.get_layer_status(theirs), strict=True):
        assert (a.enabled, a.active_adapters, sorted(a.available_adapters), a.requires_grad) == (
            b.enabled,
            b.active_adapters,
            sorted(b.available_adapters),
            b.requires_grad,
        )
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_small_helpers(tmp_path: Path) -> None:
    model = ours()
    model.save_pretrained(tmp_path)
    read = LoraConfig.from_pretrained(tmp_path)
    assert isinstance(read, LoraConfig) and read.r == 4 and not read.is_prompt_learning
    assert engine.PromptTuningConfig(num_virtual_tokens=3).is_prompt_learning
    read.save_pretrained(tmp_path / "config")
    assert peft.LoraConfig.from_pretrained(tmp_path / "config").r == 4
    with pytest.raises(ConfigError, match="not a IA3Config"):
        engine.IA3Config.from_pretrained(tmp_path)
    ours_file, theirs = engine.load_peft_weights(tmp_path), peft.load_peft_weights(str(tmp_path), device="cpu")
    assert ours_file.keys() == theirs.keys()
    assert type(get_peft_model(tiny.llama(), LoraConfig(**LORA), mixed=True)).__name__ == "PeftMixedModel"
    half = get_peft_model(tiny.llama().bfloat16(), LoraConfig(**LORA), autocast_adapter_dtype=False)
    assert {p.dtype for p in half.adapter_parameters().values()} == {torch.bfloat16}
    assert tiny.logits(half).dtype == torch.bfloat16
    plain = engine.inject_adapter_in_model(LoraConfig(**LORA), tiny.llama())
    assert not isinstance(plain, PeftModel) and any(p.requires_grad for p in plain.parameters())
    assert torch.equal(tiny.logits(plain), tiny.logits(tiny.llama()))
    with pytest.raises(ConfigError, match="Use get_peft_model"):
        engine.inject_adapter_in_model(engine.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), plain)
    ready = engine.prepare_model_for_kbit_training(tiny.llama())
    assert not any(p.requires_grad for p in ready.parameters())
    trained = get_peft_model(ready, LoraConfig(**LORA)).train()
    tiny.logits(trained).sum().backward()
    assert all(p.grad is not None for p in trained.adapter_parameters().values())


def test_push_to_hub_uploads_the_adapter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client is stood in for: there is no hub in a test."""
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Place", (), {"repo_id": repo_id})()

        def upload_folder(self, repo_id: str, folder_path: str, **kwargs: Any) -> str:
            seen.update(kwargs, repo=repo_id, files=sorted(path.name for path in Path(folder_path).iterdir()))
            return "address"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert ours().push_to_hub("me/mine", token="secret", commit_message="hello") == "address"
    assert seen["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert seen["repo"] == "me/mine" and seen["commit_message"] == "hello" and seen["token"] == "secret"
    with pytest.raises(TypeError, match="use_temp_dir"):
        ours().push_to_hub("me/mine", use_temp_dir=True)


def test_an_adapter_on_the_output_layer_travels_both_ways(tmp_path: Path) -> None:
    fields = {**LORA, "target_modules": ["lm_head", "q_proj"]}
    theirs = shaken(peft.get_peft_model(tiny.llama(), peft.LoraConfig(**fields)))
    theirs.save_pretrained(tmp_path / "theirs")
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "theirs")
    assert (tiny.logits(model) - tiny.logits(theirs.eval())).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "ours")
    assert (tiny.logits(again) - tiny.logits(model)).abs().max() < 1e-5


def test_heads_are_found_by_pefts_rule(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = DistilBertConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=16, num_labels=3)
    base = DistilBertForSequenceClassification(shape)
    fields = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["q_lin", "v_lin"]}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    mine = get_peft_model(copy.deepcopy(base), LoraConfig(**fields))
    assert mine.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    assert mine.modules_to_save == {"pre_classifier", "classifier"}
    theirs.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ids = torch.arange(6)[None]
    assert torch.allclose(again(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits, atol=1e-6)


def rows(count: int = 16) -> list[dict[str, Any]]:
    chance = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 60, (8,), generator=chance)
        found.append({"input_ids": ids, "labels": ids, "attention_mask": torch.ones(8, dtype=torch.long)})
    return found


def settings(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
    )


def test_transformers_trainer_learns_saves_adapters_and_resumes(tmp_path: Path) -> None:
    model = ours()
    trainer = AdapterTrainer(model=model, args=settings(tmp_path), train_dataset=rows(), eval_dataset=rows())
    assert isinstance(trainer, Trainer) and trainer.label_names == ["labels"]
    trainer.train()
    logged = trainer.state.log_history
    losses = [entry["eval_loss"] for entry in logged if "eval_loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files and "model.safetensors" not in files
    trainer.save_model(str(tmp_path / "final"))
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "final")
    assert (tiny.logits(again) - tiny.logits(model.eval())).abs().max() < 1e-6

    whole = AdapterTrainer(
        model=ours(), args=settings(tmp_path / "whole", max_steps=6), train_dataset=rows(), eval_dataset=rows()
    )
    whole.train()
    resumed = AdapterTrainer(
        model=ours(), args=settings(tmp_path, max_steps=6), train_dataset=rows(), eval_dataset=rows()
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    ends = [t.state.log_history for t in (whole, resumed)]
    last = [next(entry["eval_loss"] for entry in reversed(end) if "eval_loss" in entry) for end in ends]
    assert last[0] == pytest.approx(last[1], rel=2e-2)
    other = ours()
    other.add_adapter("b", LoraConfig(**LORA))
    lacking = AdapterTrainer(model=other, args=settings(tmp_path), train_dataset=rows(), eval_dataset=rows())
    with pytest.raises(CheckpointError, match="holds no adapter 'b'"):
        lacking.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_plain_trainer_sees_the_bases_arguments_and_trains(tmp_path: Path) -> None:
    data = [{**row, "a column of the user": 3} for row in rows()]
    trainer = Trainer(model=ours(), args=settings(tmp_path, save_strategy="no"), train_dataset=data, eval_dataset=data)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
