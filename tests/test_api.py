"""The public API as a script uses it (SCOPE, section A), and its errors."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, MT5Config, MT5ForConditionalGeneration

import engine
from engine import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    expand_lora_rank,
    get_optimal_config,
    get_peft_config,
    get_peft_model,
)
from engine.errors import CheckpointError, ConfigError, EngineError, TargetError, UnsafeFileError
from engine.layers import AdapterLayer
from tests import tiny


def test_every_public_name_is_there() -> None:
    for name in engine.__all__:
        assert getattr(engine, name) is not None, name
    with pytest.raises(AttributeError):
        engine.no_such_name  # noqa: B018


def test_mt0_large_counts(capsys: pytest.CaptureFixture[str]) -> None:
    config = MT5Config(
        d_model=1024, d_ff=2816, d_kv=64, num_heads=16, num_layers=24, num_decoder_layers=24, vocab_size=250112,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        base = MT5ForConditionalGeneration(config)
    peft_config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    model = get_peft_model(base, peft_config)
    assert model.get_nb_trainable_parameters() == (2_359_296, 975_825_920)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(
        "trainable params: 2,359,296 || all params: 975,825,920 || trainable%: 0.24"
    )


def test_gpt2_style_conv1d() -> None:
    model = get_peft_model(tiny.gpt2(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_proj"]))
    # c_attn 32 -> 96, attention c_proj 32 -> 32, MLP c_proj 128 -> 32, in two layers.
    expected = 2 * 4 * ((32 + 96) + (32 + 32) + (128 + 32))
    assert model.num_parameters(only_trainable=True) == expected == model.get_nb_trainable_parameters()[0]


def test_base_and_adapter_in_one_call(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = tiny.shake(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "adapter")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "base")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(again) is engine.PeftModelForCausalLM
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    made = again.generate(input_ids=tiny.ids(), max_new_tokens=4)
    assert made.shape == (2, 13)


def test_merged_folder_loads_in_plain_transformers(tmp_path: Path) -> None:
    model = tiny.shake(get_peft_model(tiny.llama(), LoraConfig(target_modules="all-linear")))
    expected = tiny.logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (tiny.logits(plain) - expected).abs().max() < 1e-5


def two_adapters() -> PeftModel:
    model = get_peft_model(
        tiny.llama(), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]), "sentiment"
    )
    tiny.shake(model, 0.2)
    model.add_adapter("translation", LoraConfig(r=2, use_rslora=True, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("translation")
    tiny.shake(model, 0.3)
    return model


def deltas(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    layers = [layer for layer in model._layers[name] if isinstance(layer, AdapterLayer)]
    return {layer.module_name: layer.adapters[name].delta_weight(layer.base_layer).detach() for layer in layers}


def test_combinations_against_the_dense_sum() -> None:
    model = two_adapters()
    names, weights = ["sentiment", "translation"], [0.7, -0.3]
    parts = [deltas(model, name) for name in names]
    model.add_weighted_adapter(names, weights, "cat", combination_type="cat")
    model.add_weighted_adapter(names, weights, "svd", combination_type="svd", svd_rank=5)
    model.add_weighted_adapter(names, weights, "small", combination_type="svd")
    for module, cat in deltas(model, "cat").items():
        dense = 0.7 * parts[0][module] - 0.3 * parts[1][module]
        assert torch.allclose(cat, dense, atol=1e-5)
        u, s, vt = torch.linalg.svd(dense)
        for name, rank in (("svd", 5), ("small", 4)):
            best = (u[:, :rank] * s[:rank]) @ vt[:rank]
            assert torch.allclose(deltas(model, name)[module], best, atol=1e-5), name
    model.set_adapter_weights({"sentiment": 0.7, "translation": -0.3})
    live = tiny.logits(model)
    model.set_adapter("cat")
    assert (tiny.logits(model) - live).abs().max() < 1e-5


def test_linear_is_pefts(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj"]), "one")
        tiny.shake(model, 0.2)
        model.add_adapter("two", LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj"]))
        model.set_adapter("two")
        tiny.shake(model, 0.3)
        model.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "one", adapter_name="one")
        theirs.load_adapter(tmp_path / "two", adapter_name="two")
        theirs.add_weighted_adapter(["one", "two"], [0.7, -0.3], "mix", combination_type="linear")
        theirs.set_adapter("mix")
        model.add_weighted_adapter(["one", "two"], [0.7, -0.3], "mix", combination_type="linear")
    model.set_adapter("mix")
    assert (tiny.logits(model) - tiny.logits(theirs.eval())).abs().max() < 1e-5


def test_load_switch_and_delete(tmp_path: Path) -> None:
    two_adapters().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "sentiment", adapter_name="sentiment")
    alone = tiny.logits(model)
    model.load_adapter(tmp_path / "translation", adapter_name="translation")
    assert torch.equal(tiny.logits(model), alone)
    model.set_adapter("translation")
    assert model.active_adapter == "translation"
    model.set_adapter_weights({"sentiment": 1, "translation": 0})
    assert torch.equal(tiny.logits(model), alone)
    model.delete_adapter("sentiment")
    assert list(model.peft_config) == ["translation"]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", [True, "pissa"])
def test_rank_expansion_keeps_function_and_moments(rslora: bool, init: bool | str) -> None:
    model = get_peft_model(
        tiny.llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=init)
    )
    optimizer = torch.optim.AdamW(model.adapter_parameters().values(), lr=1e-2)
    for _ in range(3):
        tiny.logits(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = tiny.logits(model)
    old = {name: (p, optimizer.state[p]) for name, p in model.adapter_parameters().items()}
    expand_lora_rank(model, LoraConfig(r=16, lora_alpha=32, use_rslora=rslora), optimizer=optimizer)
    assert (tiny.logits(model) - before).abs().max() < 1e-5
    new = model.adapter_parameters()
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in new.values()}
    ratio = (32 / 4 if rslora else 32 / 16) / (8 / 4)
    for name, parameter in new.items():
        corner = tuple(slice(0, n) for n in old[name][0].shape)
        moved, scale = optimizer.state[parameter], ratio if "lora_B" in name else 1.0
        assert torch.allclose(moved["exp_avg"][corner], old[name][1]["exp_avg"] * scale, rtol=1e-5)
        assert torch.allclose(moved["exp_avg_sq"][corner], old[name][1]["exp_avg_sq"] * scale**2, rtol=1e-5)
        assert moved["exp_avg"].numel() == 4 * old[name][0].numel()
        assert float(moved["exp_avg"].abs().sum()) == pytest.approx(float(moved["exp_avg"][corner].abs().sum()))
    tiny.logits(model).square().mean().backward()
    optimizer.step()
    assert (tiny.logits(model) - before).abs().max() > 1e-4
    with pytest.raises(ConfigError, match="at least as much"):
        expand_lora_rank(model, LoraConfig(r=2))


def test_own_loop_with_accelerate() -> None:
    model = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    accelerator = Accelerator(cpu=True)
    data = torch.utils.data.DataLoader(list(tiny.ids(8)), batch_size=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for _ in range(8):
        for batch in data:
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


def test_optimal_configs() -> None:
    for _ in range(2):
        config = get_optimal_config("generation", 1e9)
        assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)
        big = get_optimal_config("translation", 11e9)
        assert (big.r, big.lora_alpha, big.lora_dropout) == (64, 128, 0.1)
    assert get_optimal_config("classification", 10e9).r == 8
    with pytest.raises(ConfigError, match="classification"):
        get_optimal_config("poetry", 1)


def test_config_round_trip() -> None:
    config = LoraConfig(r=3, target_modules={"b", "a"}, rank_pattern={"a": 2}, task_type="CAUSAL_LM")
    plain = json.loads(json.dumps(config.to_dict()))
    assert plain["peft_type"] == "LORA"
    assert get_peft_config(plain).to_dict() == config.to_dict()
    assert config.target_modules == ["a", "b"]
    with pytest.raises(AttributeError):
        config.r = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "whole number"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"bias": "some"}, "none, all or lora_only"),
        ({"init_lora_weights": "magic"}, "pissa_niter_N"),
        ({"target_modules": "("}, "regular expression"),
        ({"task_type": "POETRY"}, "CAUSAL_LM"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has the key '\\('"),
        ({"rank_pattern": ["q"]}, "rank_pattern is .*mapping of names"),
        ({"alpha_pattern": {"q": float("inf")}}, r"alpha_pattern\['q'\] is inf"),
        ({"alpha_pattern": {"q": "4"}}, "alpha_pattern is .*each a number"),
        ({"r": float("nan")}, "r is nan; needed: a whole number"),
        ({"r": "8"}, "r is '8'; needed: a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_dropout": float("nan")}, "lora_dropout is nan"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; needed: True or False"),
        ({"target_modules": 5}, "target_modules is 5; needed: a list, each text, or text, or None"),
        ({"target_modules": [1]}, r"target_modules is \[1\]"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head'; needed: a list"),
        ({"layers_to_transform": [0.5]}, "layers_to_transform"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    ],
)
def test_config_faults(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LoraConfig(**fields)


@pytest.mark.parametrize("kind", [LoraConfig, engine.DoRAConfig, engine.LoHaConfig, engine.LoKrConfig])
def test_patterns_may_be_null(kind: Any) -> None:
    config = kind.from_dict({"rank_pattern": None, "alpha_pattern": None})
    assert (config.rank_pattern, config.alpha_pattern, config.scale("q_proj")) == ({}, {}, 1.0)


def test_every_config_names_what_is_not_finite() -> None:
    with pytest.raises(ConfigError, match="d_initial is inf"):
        engine.VeraConfig(d_initial=float("inf"))
    with pytest.raises(ConfigError, match="alpha is inf"):
        engine.LoHaConfig(alpha=float("inf"))


def test_all_config_faults_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r=0, lora_dropout=2, bias="x")
    assert str(caught.value).count("\n- ") == 3


def test_targets_that_match_nothing_name_the_nearest() -> None:
    with pytest.raises(TargetError) as caught:
        get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_prj", "valu"]))
    text = str(caught.value)
    assert "q_proj" in text and "all-linear" in text and "down_proj" in text
    model = tiny.llama()
    with pytest.raises(TargetError, match="layers_to_transform=9"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], layers_to_transform=9))
    assert not any(isinstance(m, AdapterLayer) for m in model.modules())


def test_a_refused_adapter_leaves_the_model_as_it_was() -> None:
    model = tiny.llama()
    with pytest.raises(TargetError, match="LlamaRMSNorm"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "norm"]))
    with pytest.raises(TargetError, match="no_head"):
        get_peft_model(model, LoraConfig(modules_to_save=["no_head"]))
    with pytest.raises(TargetError, match="singular values"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights="pissa"))
    assert not any(isinstance(m, AdapterLayer) for m in model.modules())
    nested = get_peft_model(model, LoraConfig())
    with pytest.raises(ConfigError, match="already carries"):
        get_peft_model(nested, LoraConfig())
    with pytest.raises(ConfigError, match="cannot be used"):
        nested.add_adapter("../up", LoraConfig())


def test_unknown_architecture_asks_for_targets() -> None:
    with pytest.raises(TargetError, match="linear layers are: only"):
        get_peft_model(nn.ModuleDict({"only": nn.Linear(2, 2)}), LoraConfig())


def test_adapter_for_another_base(tmp_path: Path) -> None:
    get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]), "kept")
    before = tiny.logits(model)
    config = tiny.llama().config
    config.hidden_size, config.head_dim = 64, 16
    other = type(tiny.llama())(config)
    with pytest.raises(CheckpointError, match=r"shape \(4, 32\) in the file and \(4, 64\)"):
        PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(TargetError, match="q_proj"):
        PeftModel.from_pretrained(tiny.gpt2(), tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**raw, "target_modules": ["v_proj"]}))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        model.load_adapter(tmp_path, "broken")
    assert list(model.peft_config) == ["kept"] and torch.equal(tiny.logits(model), before)


def test_damaged_missing_and_unsafe_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter folder"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not an adapter"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)
    get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)
    weights.unlink()

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "opened",))

    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UnsafeFileError, match="pickle"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "SOMETHING"}, "SOMETHING"),
        ({"use_bdlora": True}, "use_bdlora is True"),
        ({"made_up": 1}, "made_up is not a field"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ],
)
def test_configs_that_ask_for_more_than_there_is(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EngineError, match=words):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_merging_into_a_tied_head_is_refused() -> None:
    model = get_peft_model(tiny.llama(tie=True), LoraConfig(target_modules=["lm_head"]))
    tiny.shake(model)
    with pytest.raises(TargetError, match=r"embed_tokens and lm_head|lm_head and .*embed_tokens"):
        model.merge_and_unload()
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama(tie=True)))


def test_merging_nan_is_refused_and_changes_nothing() -> None:
    model = tiny.shake(get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"])))
    with torch.no_grad():
        next(iter(model.adapter_parameters().values()))[0, 0] = float("nan")
    with pytest.raises(EngineError, match="not finite"):
        model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))


def test_bf16_base_keeps_fp32_adapters() -> None:
    model = get_peft_model(tiny.llama().to(torch.bfloat16), LoraConfig(target_modules="all-linear"))
    assert {p.dtype for p in model.adapter_parameters().values()} == {torch.float32}
    tiny.shake(model)
    out = tiny.logits(model)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.adapter_parameters().values())


def test_wrapped_layers_answer_for_their_base() -> None:
    model = get_peft_model(tiny.gpt2(), LoraConfig())
    assert isinstance(model.get_base_model(), GPT2LMHeadModel)
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, AdapterLayer) and layer.nf == 96 and layer.weight.shape == (32, 96)
    with pytest.raises(AttributeError):
        _ = layer.no_such_thing


def test_a_failed_attach_gives_the_model_back(tmp_path: Path) -> None:
    get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**raw, "r": 2}))
    model = tiny.llama()
    for attempt in (
        lambda: PeftModel.from_pretrained(model, tmp_path),
        lambda: get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])),
    ):
        with pytest.raises(EngineError):
            attempt()
        assert not any(isinstance(m, AdapterLayer) for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "one")
    with pytest.raises(TargetError, match="lm_head"):
        peft_model.add_adapter("two", LoraConfig(target_modules=["lm_head"]))


def test_merging_biases_and_saved_modules_of_several() -> None:
    config = LoraConfig(target_modules=["q_proj"], bias="lora_only", modules_to_save=["lm_head"])
    model = get_peft_model(tiny.llama(), config, "one")
    tiny.shake(model, 0.2)
    model.add_adapter("two", config)
    model.set_adapter("two")
    tiny.shake(model, 0.4)
    live_two = tiny.logits(model)
    model.set_adapter(["one", "two"])
    live = tiny.logits(model)
    model.merge_adapter(["one"])
    assert (tiny.logits(model) - live).abs().max() < 1e-5
    model.merge_adapter()
    assert (tiny.logits(model) - live).abs().max() < 1e-5
    model.unmerge_adapter()
    model.set_adapter("one")
    assert (tiny.logits(model.merge_and_unload(adapter_names=["two"])) - live_two).abs().max() < 1e-5


def test_expanded_pissa_and_classifier_mixes(tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    tiny.shake(model)
    expand_lora_rank(model, LoraConfig(r=4, lora_alpha=8))
    model.save_pretrained(tmp_path)
    assert (tiny.logits(PeftModel.from_pretrained(tiny.llama(), tmp_path)) - tiny.logits(model)).abs().max() < 1e-5
    heads = get_peft_model(tiny.bert(), LoraConfig(task_type="SEQ_CLS"), "one")
    heads.add_adapter("two", LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(ConfigError, match="whole modules"):
        heads.add_weighted_adapter(["one", "two"], [1, 1], "mix")


def test_an_adapter_over_another_embedding_is_refused(tmp_path: Path) -> None:
    model = tiny.shake(get_peft_model(tiny.llama(), LoraConfig(target_modules=["embed_tokens"])))
    live = tiny.logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(again), live)
    other = tiny.llama()
    with torch.no_grad():
        other.model.embed_tokens.weight += 1
    with pytest.raises(CheckpointError, match="another base embedding"):
        PeftModel.from_pretrained(other, tmp_path)
