"""Virtual tokens: their formulas, their place among rows, masks and positions, their start, their files, their runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from engine import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from engine.errors import ConfigError, EngineError
from engine.tasks.causal_lm import keeps_rows_apart
from tests import tiny
from tests.test_train import ROOT, data, job, losses, train  # noqa: F401 (data is a fixture)

CONFIGS: dict[str, Any] = {
    "prompt": PromptTuningConfig(num_virtual_tokens=4),
    "encoder": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5),
}
each_config = pytest.mark.parametrize("kind", list(CONFIGS))


def fresh(kind: str, build: Any = tiny.llama, size: float = 0.3) -> Any:
    return tiny.shake(get_peft_model(build(), CONFIGS[kind]), size)


# --- formulas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_prompt_tuning_is_the_base_on_embeddings_with_p_in_front(build: Any) -> None:
    model = tiny.shake(get_peft_model(build(), CONFIGS["prompt"])).double()
    table = model.adapter_parameters()["prompt_encoder.prompt_embeddings"]
    plain = build().double()
    before = plain.get_input_embeddings()(tiny.ids())
    expected = plain(inputs_embeds=torch.cat([table.expand(2, -1, -1), before], dim=1)).logits
    assert torch.allclose(model(tiny.ids()).logits, expected, atol=1e-12)
    labels = torch.cat([torch.full((2, 4), -100), tiny.ids()], dim=1)
    loss = nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    # transformers takes the loss in float32.
    assert (model(tiny.ids(), labels=tiny.ids()).loss - loss).abs() < 1e-6


def test_p_tuning_networks() -> None:
    """h = W3 relu(W2 relu(W1 e + b1) + b2) + b3, and W2 relu(W1 [forward; backward LSTM](e)), written out."""
    for kind in ("MLP", "LSTM"):
        config = PromptEncoderConfig(
            num_virtual_tokens=4, encoder_hidden_size=6, encoder_reparameterization_type=kind, encoder_num_layers=1
        )
        model = tiny.shake(get_peft_model(tiny.llama(), config)).double()
        p = {k.removeprefix("prompt_encoder.encoder."): v for k, v in model.adapter_parameters().items()}
        e = p["embedding.weight"]
        if kind == "LSTM":
            both = []
            for suffix, order in (("", range(4)), ("_reverse", range(3, -1, -1))):
                w, u = p[f"lstm_head.weight_ih_l0{suffix}"], p[f"lstm_head.weight_hh_l0{suffix}"]
                bias = p[f"lstm_head.bias_ih_l0{suffix}"] + p[f"lstm_head.bias_hh_l0{suffix}"]
                h, c = torch.zeros(6).double(), torch.zeros(6).double()
                out: list[Any] = [None] * 4
                for t in order:
                    i, f, g, o = (w @ e[t] + u @ h + bias).chunk(4)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = out[t] = o.sigmoid() * c.tanh()
                both.append(torch.stack(out))
            e = torch.cat(both, dim=1)
        layers = [0, 2] if kind == "LSTM" else [0, 2, 4]
        for number in layers:
            e = e @ p[f"mlp_head.{number}.weight"].T + p[f"mlp_head.{number}.bias"]
            e = e if number == layers[-1] else e.clamp(min=0)
        assert torch.allclose(model.prompts["default"](), e, atol=1e-12)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_a_prefix_of_real_keys_is_the_text_that_made_them(build: Any) -> None:
    """Keys and values of a text, put into the table, let the rest be read as behind that text."""
    plain = build().double()
    text = tiny.ids(1, 14)
    with torch.no_grad():
        expected = plain(text).logits[:, 5:]
        layers = plain(text[:, :5]).past_key_values.layers
        model = get_peft_model(build(), CONFIGS["prefix"]).double()
        table = model.adapter_parameters()["prompt_encoder.prompt_embeddings"]
        slots = [part[0] for layer in layers for part in (layer.keys, layer.values)]
        table.copy_(torch.stack(slots).permute(2, 0, 1, 3).reshape(table.shape))
        assert torch.allclose(model(text[:, 5:]).logits, expected, atol=1e-12)


def test_a_prefix_at_t5_is_before_the_decoder() -> None:
    plain, text, start = tiny.t5().double(), tiny.ids(1), tiny.ids(1, 8)
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_transformer_submodules=1)
    model = get_peft_model(tiny.t5(), config).double()
    with torch.no_grad():
        expected = plain(input_ids=text, decoder_input_ids=start).logits[:, 3:]
        cache = plain(input_ids=text, decoder_input_ids=start[:, :3], use_cache=True).past_key_values
        slots = [part[0] for layer in cache.self_attention_cache.layers for part in (layer.keys, layer.values)]
        table = model.adapter_parameters()["prompt_encoder.prompt_embeddings"]
        table.copy_(torch.stack(slots).permute(2, 0, 1, 3).reshape(table.shape))
        assert torch.allclose(model(input_ids=text, decoder_input_ids=start[:, 3:]).logits, expected, atol=1e-12)


def test_a_prefix_projection() -> None:
    config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=7)
    model = tiny.shake(get_peft_model(tiny.llama(), config)).double()
    p = {k.removeprefix("prompt_encoder.encoder."): v for k, v in model.adapter_parameters().items()}
    inner = (p["embedding.weight"] @ p["transform.0.weight"].T + p["transform.0.bias"]).tanh()
    expected = inner @ p["transform.2.weight"].T + p["transform.2.bias"]
    assert torch.allclose(model.prompts["default"](), expected, atol=1e-12)
    zero = get_peft_model(tiny.llama(), config.replace(init_weights="zero"))
    assert not zero.prompts["default"]().any()


# --- rows ----------------------------------------------------------------------------------------------------------


@each_config
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_left_padding_changes_no_answer(kind: str, build: Any, how: dict[str, Any]) -> None:
    model = fresh(kind, build)
    short, long = tiny.ids(1, 5), tiny.ids(1, 9)
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    more = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, **how}
    together = model.generate(input_ids=ids, attention_mask=mask, **more)
    assert torch.equal(together[0, 9:], model.generate(input_ids=short, **more)[0, 5:])
    assert torch.equal(together[1], model.generate(input_ids=long, **more)[0])


def several() -> Any:
    model = get_peft_model(tiny.llama(), CONFIGS["prompt"], "prompt")
    for name in ("encoder", "prefix"):
        model.add_adapter(name, CONFIGS[name])
    model.add_adapter("lora", LoraConfig(target_modules="all-linear"))
    for name in ("prompt", "encoder", "prefix", "lora"):
        model.set_adapter(name)
        tiny.shake(model, 0.3)
    return model.eval()


def test_rows_with_unequal_adapters_and_padding() -> None:
    model, names = several(), ["prefix", None, "lora", "prompt", "encoder"]
    ids = tiny.ids(5)
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[3, 6:] = 0
    together = model(ids, attention_mask=mask, adapter_names=names).logits[:, -9:]
    some = model(ids, attention_mask=mask, adapter_names=names, logits_to_keep=torch.tensor([2, 5])).logits
    assert torch.allclose(some, together[:, [2, 5]], atol=1e-6)
    for row, name in enumerate(names):
        length = int(mask[row].sum())
        alone = model(ids[row : row + 1, :length], adapter_names=[name]).logits[0, -length:]
        assert (together[row, :length] - alone).abs().max() < 1e-5, name
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), adapter_names=names).loss
    model.set_adapter(["prompt", "encoder", "prefix", "lora"])
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), adapter_names=names).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for n in ("prompt", "prefix") for p in params(model, n))


def params(model: Any, name: str) -> list[nn.Parameter]:
    return list(model.adapter_parameters(name).values())


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_unequal_rows(beams: int) -> None:
    model, names = several(), ["prefix", None, "lora", "prompt", "encoder"]
    more = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "num_beams": beams}
    together = model.generate(input_ids=tiny.ids(5), adapter_names=names, **more)
    for row, name in enumerate(names):
        ids = tiny.ids(5)[row : row + 1]
        assert torch.equal(together[row], model.generate(input_ids=ids, adapter_names=[name], **more)[0]), name
    assert len({tuple(row[9:].tolist()) for row in together}) > 1


def test_t5_rows_with_unequal_adapters() -> None:
    task = {"task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(tiny.t5(), CONFIGS["prompt"].replace(**task), "prompt")
    model.add_adapter("prefix", CONFIGS["prefix"].replace(**task))
    for name in ("prompt", "prefix"):
        model.set_adapter(name)
        tiny.shake(model, 0.5)
    names, ids, start = ["prefix", None, "prompt"], tiny.ids(3), tiny.ids(3, 5)
    together = model(input_ids=ids, decoder_input_ids=start, adapter_names=names).logits
    more = {"max_new_tokens": 6, "num_beams": 2}
    answers = model.generate(input_ids=ids, adapter_names=names, **more)
    for row, name in enumerate(names):
        one = slice(row, row + 1)
        alone = model(input_ids=ids[one], decoder_input_ids=start[one], adapter_names=[name]).logits
        assert (together[one] - alone).abs().max() < 1e-5
        answer = model.generate(input_ids=ids[one], adapter_names=[name], **more)[0]
        assert torch.equal(answers[row, : len(answer)], answer)
    with pytest.raises(EngineError, match="encoder_outputs"):
        model.set_adapter("prompt")
        model(encoder_outputs=(torch.zeros(3, 9, 32),), decoder_input_ids=start)


def test_beside_lora_at_once() -> None:
    """[prefix | prompt | text] through layers with LoRA at weight 0.5."""
    model = several()
    model.set_adapter_weights({"lora": 0.5, "prompt": 1.0, "prefix": 1, "encoder": 0})
    ours = tiny.logits(model)
    with torch.no_grad():
        table = model.prompts["prompt"]()
        before = model.get_input_embeddings()(tiny.ids())
        model.set_adapter_weights({"lora": 0.5, "prefix": 1})
        expected = model(inputs_embeds=torch.cat([table.expand(2, -1, -1), before], dim=1)).logits
    assert torch.allclose(ours, expected, atol=1e-6)
    model.set_adapter_weights({"lora": 0.5, "prompt": 1.0, "prefix": 1})
    model.merge_adapter(["lora"])
    assert (tiny.logits(model) - ours).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="changes no weight"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="whole or not at all"):
        model.set_adapter_weights({"lora": 0.5, "prompt": 0.5})
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))
    assert torch.equal(tiny.logits(model.unload()), tiny.logits(tiny.llama()))


def test_several_are_saved_and_loaded_together(tmp_path: Path) -> None:
    model = several()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "prompt", "prompt")
    for name in ("encoder", "prefix", "lora"):
        again.load_adapter(tmp_path / name, name)
    names = ["lora", "prefix", "prompt", "encoder", None]
    a, b = (m(tiny.ids(5), adapter_names=names).logits for m in (model, again))
    assert torch.equal(a, b)
    twin = copy.deepcopy(again)
    again.delete_adapter("prefix")
    assert set(again.prompts) == {"prompt", "encoder"}
    assert torch.equal(twin(tiny.ids(5), adapter_names=names).logits, a)


def test_a_classifier_reads_its_last_token_behind_virtual_ones() -> None:
    """PEFT answers from the padding here: embeddings do not show it."""
    torch.manual_seed(1)
    base = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_labels=3, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    model = tiny.shake(get_peft_model(base, CONFIGS["prompt"].replace(task_type="SEQ_CLS")), 0.3)
    ids = tiny.ids()
    ids[0, 6:] = 0
    for mask in (None, ids.ne(0).long()):
        both = model(ids, attention_mask=mask, labels=torch.tensor([0, 2])).logits
        assert torch.allclose(both[:1], model(ids[:1, :6]).logits, atol=1e-5)
        assert torch.allclose(both[1:], model(ids[1:]).logits, atol=1e-5)


# --- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.t5, tiny.bert])
def test_prefixes_under_gradient_checkpointing(build: Any) -> None:
    gradients = []
    task = {tiny.t5: "SEQ_2_SEQ_LM", tiny.bert: "SEQ_CLS"}.get(build, "CAUSAL_LM")
    for recompute in (False, True):
        model = tiny.shake(get_peft_model(build(), CONFIGS["prefix"].replace(task_type=task))).train()
        if recompute:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        tiny.logits(model).square().mean().backward()
        gradients.append(model.adapter_parameters()["prompt_encoder.prompt_embeddings"].grad.clone())
    assert gradients[0].any()
    assert torch.allclose(*gradients, atol=1e-7)
    recomputing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert recomputing
    assert not any(m.__dict__.get("_can_checkpoint_with_cache") for m in recomputing)


def test_what_cannot_work_is_refused() -> None:
    model = fresh("prefix").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(EngineError, match="use_reentrant=False"):
        tiny.logits(model)
    with pytest.raises(EngineError, match=r"model\.eval\(\)"):
        model.generate(input_ids=tiny.ids(), max_new_tokens=2)
    for kind in ("prompt", "prefix"):
        with pytest.raises(EngineError, match="cache_implementation"):
            fresh(kind).generate(input_ids=tiny.ids(), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ConfigError, match="no configuration"):
        get_peft_model(tiny.pixels(), CONFIGS["prompt"])
    with pytest.raises(ConfigError, match="3 heads"):
        get_peft_model(tiny.llama(), PrefixTuningConfig(num_attention_heads=3))
    with pytest.raises(ConfigError, match="num_virtual_tokens is 0"):
        PromptTuningConfig(num_virtual_tokens=0)
    small = DistilBertConfig(vocab_size=64, dim=32, hidden_dim=64, n_layers=1, n_heads=2)
    other = get_peft_model(DistilBertForSequenceClassification(small), CONFIGS["prefix"].replace(task_type="SEQ_CLS"))
    with pytest.raises(EngineError, match="does not read keys and values"):
        other(tiny.ids())
    assert not keeps_rows_apart(fresh("prompt"))
