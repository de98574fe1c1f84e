"""Bases in bitsandbytes' codes: loading, training from a job, merging, and models whose loader cannot quantise."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import LoraConfig, bnb, get_peft_model
from engine.errors import ConfigError, TargetError
from engine.models.loading import load_causal_lm
from engine.train.job import JobSpec
from tests import tiny
from tests.test_train import data, losses, train
from tests.test_train import job as adapter_job

__all__ = ["data"]
LIMITS = {"nf4": 0.27, "fp4": 0.27, "int8": 0.52}
IDS = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(LIMITS))
def test_loading_in_codes(kind: str, precision: str) -> None:
    plain, _ = load_causal_lm("tiny-llama", precision="fp32")
    model, _ = load_causal_lm("tiny-llama", precision=precision, quantization=kind)
    layers = [layer for _, layer in bnb.packed_layers(model)]
    # Of seven in a block, 4 bits leave the value projection alone, which two query heads share.
    assert len(layers) == (28 if kind == "int8" else 24) and type(model.get_output_embeddings()) is nn.Linear
    full = sum(2 * layer.in_features * layer.out_features for layer in layers)
    assert sum(map(bnb.weight_bytes, layers)) < LIMITS[kind] * full
    expected = logits(plain)
    assert 0 < (logits(model) - expected).norm() < 0.5 * expected.norm()
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    alike = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear"))
    assert wrapped.get_nb_trainable_parameters() == alike.get_nb_trainable_parameters()
    # Scales are no parameters, and count all the same.
    own = sum(t.numel() * t.element_size() for t in (*wrapped.parameters(), *wrapped.buffers()))
    assert wrapped.get_memory_footprint() - own == sum(map(bnb.statistics_bytes, layers)) > 0
    assert wrapped.get_memory_footprint() < alike.get_memory_footprint()


def test_faults_of_loading() -> None:
    with pytest.raises(ConfigError, match=r"'int4'.*nf4, fp4, int8"):
        load_causal_lm("tiny-llama", quantization="int4")


def test_gpt2_in_codes(tmp_path: Path) -> None:
    """Conv1D holds its matrix the other way round; an adapter trained in codes fits the plain model."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 2}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    base.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = tiny.logits(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=bnb.config("nf4", torch.float32), device_map={"": "cpu"}
    ).eval()
    packed = dict(bnb.packed_layers(model))
    layer = packed["transformer.h.0.attn.c_attn"]
    conv = base.get_submodule("transformer.h.0.attn.c_attn")
    weight = conv.weight.detach().T
    assert (bnb.dequantized(layer) - weight).norm() < 0.12 * weight.norm()
    with torch.no_grad():
        assert (tiny.logits(model) - expected).norm() < 0.3 * expected.norm()
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False)).eval()
    own = sum(t.numel() * t.element_size() for t in (*tuned.parameters(), *tuned.buffers()))
    assert tuned.get_memory_footprint() - own == sum(map(bnb.statistics_bytes, packed.values())) > 0
    with torch.no_grad():
        full = tuned.merge_into_full(base)
        assert type(full.get_submodule("transformer.h.0.attn.c_attn")).__name__ == "Conv1D"
        assert (tiny.logits(full) - tiny.logits(tuned)).norm() < 0.3 * expected.norm()
        assert (tiny.logits(full) - expected).norm() > 0.3 * expected.norm()


@pytest.mark.parametrize("kind", list(LIMITS))
def test_a_unet_in_codes(kind: str) -> None:
    pytest.importorskip("diffusers")
    from tests import diffusion

    unet = diffusion.unet().eval()
    with torch.no_grad():
        expected = diffusion.answer(unet)
        before = bnb.memory_footprint(unet)
        linears = {n: m.in_features for n, m in unet.named_modules() if type(m) is nn.Linear}
        skipped, *fit = [n for n, width in linears.items() if kind == "int8" or width % 64 == 0]
        assert len(fit) > 3
        assert bnb.quantize_model(unet, kind, skip=[skipped]) is unet
        got = diffusion.answer(unet)
    names = [name for name, _ in bnb.packed_layers(unet)]
    assert sorted(names) == sorted(fit) and skipped not in names
    assert bnb.memory_footprint(unet) < before
    assert 0 < (got - expected).norm() < 0.3 * expected.norm()
    held = bnb.memory_footprint(unet)
    model = get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    trained, _ = model.get_nb_trainable_parameters()
    assert model.get_memory_footprint() == held + 4 * trained
    loss = diffusion.answer.__wrapped__(model).square().mean()  # type: ignore[attr-defined]
    loss.backward()
    grads = [p.grad for n, p in model.adapter_parameters().items() if "lora_B" in n]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)
    with pytest.raises(TargetError, match="carries adapters"):
        bnb.quantize_model(model.get_base_model(), kind)
    with pytest.raises(TargetError, match="no linear layer"):
        bnb.quantize_model(nn.Sequential(nn.Conv2d(1, 1, 1)), kind)


def test_tied_and_output_layers_stay() -> None:
    model = bnb.quantize_model(tiny.llama(tie=True), "int8")
    assert "lm_head" not in dict(bnb.packed_layers(model))
    assert type(bnb.quantize_model(tiny.llama(), "int8").get_output_embeddings()) is nn.Linear  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_after_an_evaluation_are_those_before(kind: str) -> None:
    """bitsandbytes repacks weights in evaluation on some processors, and its repacked layers pass no gradient."""
    model, _ = load_causal_lm("tiny-llama", precision="bf16", quantization=kind)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    found = []
    for _ in range(2):
        tuned.train()
        tuned.zero_grad()
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad.clone() for p in tuned.adapter_parameters().values()])  # type: ignore[union-attr]
        tuned.eval()
        logits(tuned)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not any(getattr(getattr(m.weight, "quant_state", None), "packing_format_for_cpu", False)
                   for _, m in bnb.packed_layers(tuned))  # fmt: skip


@pytest.mark.parametrize("how", ["loaded", "replaced"])
def test_layers_that_bitsandbytes_reads_wrongly_stay(how: str, tmp_path: Path) -> None:
    """Rows of 32 values in blocks of 64: on a CPU its weights come back wrong."""
    base = tiny.llama()
    if how == "loaded":
        from transformers import AutoModelForCausalLM

        from engine.models.loading import quantized_loading

        base.save_pretrained(tmp_path)
        more = quantized_loading("nf4", torch.float32, torch.device("cpu"), base.config, AutoModelForCausalLM)  # type: ignore[arg-type]
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **more)
    else:
        model = bnb.quantize_model(tiny.llama(), "nf4")
    packed = dict(bnb.packed_layers(model))
    assert {name.rsplit(".", 1)[-1] for name in packed} == {"down_proj"}
    assert not {name for name, m in base.named_modules() if type(m) is nn.Linear and m.in_features % 64} & {*packed}
    for name, layer in packed.items():
        weight = base.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        assert (bnb.dequantized(layer) - weight).norm() < 0.11 * weight.norm()


def quantised(spec: JobSpec, kind: str) -> JobSpec:
    return JobSpec.from_dict(spec.to_dict() | {"quantization": kind})


def test_qlora_from_a_job(data: Path, tmp_path: Path) -> None:
    spec = adapter_job(data, max_steps=12)
    ends = {"none": 0.0, "nf4": 0.0}
    # Three seeds: in one run the order of rows and dropout's masks move the end by some per cent.
    for seed in range(3):
        seeded = dataclasses.replace(spec, training=dataclasses.replace(spec.training, seed=seed))
        for kind in ends:
            state, recorder = train(quantised(seeded, kind), tmp_path / kind / str(seed))
            done = recorder.of("done")[0]
            assert state == "done" and recorder.of("start")[0]["quantization"] == kind
            assert done["eval_loss"] < 0.8 * done["first_eval_loss"]
            ends[kind] += done["eval_loss"]
    # A toy of 256 channels rounds worse than a real model, for which tests/test_qlora_smollm2.py says 3 %.
    assert ends["nf4"] == pytest.approx(ends["none"], rel=0.06)
    base, _ = load_causal_lm("tiny-llama", precision="fp32")
    from engine import PeftModel

    assert (logits(PeftModel.from_pretrained(base, tmp_path / "nf4" / "0" / "adapter")) - logits(base)).abs().max() >= 0


def test_pausing_is_exact_in_codes(data: Path, tmp_path: Path) -> None:
    from engine.errors import CheckpointError
    from tests.test_train import At

    spec = quantised(adapter_job(data), "int8")
    _, whole = train(spec, tmp_path / "whole")
    _, first = train(spec, tmp_path / "run", At(5, "pause"))
    with pytest.raises(CheckpointError, match="other settings"):
        train(quantised(spec, "nf4"), tmp_path / "run", resume=True)
    _, second = train(spec, tmp_path / "run", resume=True)
    curve = losses(first) | losses(second)
    assert max(abs(curve[step] - loss) for step, loss in losses(whole).items()) < 1e-6


@pytest.mark.parametrize("kind", list(LIMITS))
def test_merging_for_good_and_into_the_full_base(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = load_causal_lm("tiny-llama", precision="fp32", quantization=kind)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(model, config).eval()
    tuned.set_adapter_weights({"default": 0.5})
    live, start = logits(tuned), bnb.snapshot(model.get_submodule("model.layers.0.self_attn.q_proj.base_layer"))[0]
    full = tuned.merge_into_full()
    # The full base's own error against the quantised one is all that differs.
    assert next(bnb.packed_layers(full), None) is None
    plain, _ = load_causal_lm("tiny-llama", precision="fp32")
    twin = get_peft_model(plain, config).eval()
    from engine import get_peft_model_state_dict, set_peft_model_state_dict

    set_peft_model_state_dict(twin, get_peft_model_state_dict(tuned))
    twin.set_adapter_weights({"default": 0.5})
    assert torch.allclose(logits(full), logits(twin), atol=1e-4)
    assert torch.equal(logits(tuned), live)
    with pytest.raises(TargetError, match="quantised itself"):
        tuned.merge_into_full(load_causal_lm("tiny-llama", quantization=kind)[0])

    with caplog.at_level(logging.WARNING, logger="engine.merging"):
        merged = tuned.merge_and_unload()
    assert "Merged into 8 quantised layers" in caplog.text and "merge_into_full" in caplog.text
    assert type(merged.get_submodule("model.layers.0.self_attn.q_proj")).__name__ in (bnb.FOUR, bnb.EIGHT)
    errors = tuned.merge_errors
    assert len(errors) == 8 and all(0 < error.weight < 0.2 for error in errors.values())
    assert (logits(merged) - live).norm() < 0.5 * live.norm()
    now = bnb.snapshot(merged.get_submodule("model.layers.0.self_attn.q_proj"))[0]
    assert not torch.equal(now, start)


def test_a_bias_merges_once() -> None:
    linear = nn.Linear(64, 64)
    model = bnb.quantize_model(nn.Sequential(linear), "int8", torch.float32)
    config = LoraConfig(r=2, lora_alpha=6, lora_bias=True, target_modules=["0"])
    tuned = get_peft_model(model, config).eval()
    weights = tuned.base_model.model[0].adapters["default"]  # type: ignore[index]
    nn.init.constant_(weights.lora_B.bias, 0.25)
    before = linear.bias.detach().clone()
    tuned.merge_adapter()
    layer = tuned.base_model.model[0].base_layer  # type: ignore[index]
    # s = alpha / r = 3
    assert torch.allclose(layer.bias.float(), before + 0.75, atol=1e-3)
    tuned.unmerge_adapter()
    assert torch.equal(layer.bias, before)


def test_notices_are_silent_and_warnings_are_not(caplog: pytest.LogCaptureFixture) -> None:
    bnb.silence()
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).warning("inputs will be cast from %s to float16", "x")
        logging.getLogger(name).warning("Failed to load CPU gemm_4bit_forward: %s", "x")
        logging.getLogger(name).warning("something real")
    assert [record.message for record in caplog.records] == ["something real"] * 2
