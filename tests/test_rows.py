"""Mixed batches: rows hold for their own call, again where layers are recomputed, and there is one name a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from engine.errors import EngineError
from tests import tiny


def two() -> PeftModel:
    model = tiny.shake(get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "a"))
    model.add_adapter("b", LoraConfig(r=6, lora_alpha=24, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("b")
    tiny.shake(model, 0.3)
    model.set_adapter("a")
    return model


def gradients(recompute: bool, reentrant: bool = False) -> list[torch.Tensor]:
    """Of two mixed calls and a plain one in one backward pass."""
    model, x = two(), tiny.ids()
    model.set_adapter(["a", "b"])
    model.train()
    if recompute:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    calls: list[dict[str, Any]] = [{"adapter_names": ["a", "b"]}, {}, {"adapter_names": ["b", "__base__"]}]
    loss = sum((i + 1) * model(input_ids=x, labels=x, use_cache=False, **call).loss for i, call in enumerate(calls))
    loss.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_see_the_rows_of_their_own_call(reentrant: bool) -> None:
    plain, again = gradients(False), gradients(True, reentrant)
    assert len(plain) == 16 and max(float(g.abs().max()) for g in plain) > 1e-3
    for a, b in zip(plain, again, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_rows_end_with_their_call() -> None:
    model, x = two(), tiny.ids()
    alone = model(input_ids=x).logits
    rows = model(input_ids=x, adapter_names=["b", "b"]).logits
    assert not torch.allclose(rows, alone)
    for call in (model, model.base_model, model.get_base_model()):
        assert torch.equal(call(input_ids=x).logits, alone)
    with pytest.raises(RuntimeError):
        model(input_ids=x.float(), adapter_names=["b", "b"])
    assert torch.equal(model.base_model(input_ids=x).logits, alone)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    layer = model.get_base_model().model.layers[0]
    before = layer._gradient_checkpointing_func
    model(input_ids=x, adapter_names=["b", "b"])
    assert layer._gradient_checkpointing_func is before


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "a"], ["a", "b"] * 4, ["a"] * 5])
def test_one_name_a_row(names: list[str]) -> None:
    model, x = two(), tiny.ids(4)
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    words = f"adapter_names has {len(names)} names and the batch 4 rows"
    calls: list[Any] = [
        lambda: model(x, adapter_names=names),
        lambda: model(input_ids=x, attention_mask=torch.ones_like(x), adapter_names=names),
        lambda: model(inputs_embeds=model.get_input_embeddings()(x), adapter_names=names),
        lambda: model.generate(x, adapter_names=names, max_new_tokens=2),
        lambda: model.generate(input_ids=x, adapter_names=names, max_new_tokens=2, num_beams=2),
    ]
    for call in calls:
        with pytest.raises(EngineError, match=words):
            call()
    assert model.switchboard.rows is None
