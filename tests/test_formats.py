"""Stable Diffusion's adapter files in both directions, against diffusers' own loader (which uses the PEFT library)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

import engine
from engine import DoRAConfig, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from engine.errors import CheckpointError, ConfigError
from engine.formats import load_adapter_file, read_diffusers, read_kohya, sniff, write_diffusers, write_kohya
from engine.formats.names import Names, by_rule, from_original, to_original
from tests import diffusion, tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

# Every kind of layer that a UNet has, and the four projections of CLIP without which diffusers misreads kohya's names.
UNET = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "time_emb_proj", "conv_in", "conv1", "conv"]
UNET += ["conv_shortcut", "linear_1"]
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
WRITERS = {"kohya": write_kohya, "diffusers": write_diffusers}
READERS = {"kohya": read_kohya, "diffusers": read_diffusers}


def pair(config: Any, targets: list[str] | None = None, **more: Any) -> dict[str, PeftModel]:
    """A UNet and a text encoder with random adapters."""
    unet = get_peft_model(diffusion.unet(), config(target_modules=targets or UNET, **more))
    text = get_peft_model(diffusion.encoder(), config(target_modules=CLIP, **more))
    return {"unet": tiny.shake(unet), "text_encoder": tiny.shake(text, 0.05)}


def fresh() -> dict[str, Any]:
    return {"unet": diffusion.unet(), "text_encoder": diffusion.encoder()}


def same(one: Any, other: Any, names: tuple[str, ...] = ("unet", "text_encoder"), limit: float = 1e-5) -> None:
    plain = fresh()
    for name in names:
        expected = diffusion.answer(other[name])
        assert (diffusion.answer(one[name]) - expected).abs().max() < limit, name
        assert (diffusion.answer(plain[name]) - expected).abs().max() > 1e-2, name


def parts(pipe: Any) -> dict[str, Any]:
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


LORAS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (LoraConfig, {"r": 4, "lora_alpha": 6}),
    "rslora": (LoraConfig, {"r": 4, "lora_alpha": 2, "use_rslora": True}),
    "ranks": (LoraConfig, {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2, "fc1": 3}}),
    "dora": (DoRAConfig, {"r": 4, "lora_alpha": 6}),
}


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", LORAS)
def test_our_files_load_in_diffusers(name: str, form: str, tmp_path: Path) -> None:
    if (name, form) == ("dora", "kohya"):
        pytest.skip("diffusers leaves dora_scale out of kohya's files")
    config, more = LORAS[name]
    ours = pair(config, **more)
    path = WRITERS[form](ours, tmp_path / "adapter.safetensors")
    pipe = diffusion.pipeline()
    pipe.load_lora_weights(str(path))
    same(parts(pipe), ours)


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    **LORAS,
    "patterns": (LoraConfig, {"r": 4, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3, "conv1": 1}}),
    "pissa": (LoraConfig, {"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa"}),
    "loha": (LoHaConfig, {"r": 2, "alpha": 3}),
    "loha-modes": (LoHaConfig, {"r": 2, "alpha": 3, "use_effective_conv2d": True}),
    "lokr": (LoKrConfig, {"r": 2, "alpha": 3}),
    "lokr-both-modes": (LoKrConfig, {"r": 1, "alpha": 3, "decompose_both": True, "use_effective_conv2d": True}),
    "lokr-whole": (LoKrConfig, {"r": 64, "alpha": 100, "decompose_factor": 4}),
}
LINEAR = [*CLIP, "to_q", "to_k", "ff.net.0.proj"]


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", METHODS)
def test_there_and_back(name: str, form: str, tmp_path: Path) -> None:
    config, more = METHODS[name]
    ours = pair(config, LINEAR if name == "pissa" else None, **more)
    path = tmp_path / "adapter.safetensors"
    if (config, form) == (LoHaConfig, "diffusers"):
        with pytest.raises(ConfigError, match="LoHa adapter, which diffusers does not read"):
            write_diffusers(ours, path)
        assert not list(tmp_path.iterdir())
        return
    WRITERS[form](ours, path)
    assert sniff(path) == form
    models = fresh()
    same(load_adapter_file(models, path), ours)
    # The models that were given are the ones that were adapted.
    same(models, ours)
    # Names found by rule are those found in the model.
    by_names, by_models = READERS[form](path), READERS[form](path, fresh())
    for component, part in by_models.items():
        other = by_names[component]
        start = "" if component == "unet" else "text_model."
        renamed = {key.replace(engine.checkpoint.PREFIX, engine.checkpoint.PREFIX + start) for key in part.tensors}
        assert renamed == other.tensors.keys()
        assert {k: v for k, v in part.config.to_dict().items() if "pattern" not in k and k != "target_modules"} == {
            k: v for k, v in other.config.to_dict().items() if "pattern" not in k and k != "target_modules"
        }
    # As a folder in PEFT's format, for either library.
    by_names["unet"].save_pretrained(tmp_path / "unet")
    again = PeftModel.from_pretrained(diffusion.unet(), tmp_path / "unet")
    theirs = peft.PeftModel.from_pretrained(diffusion.unet(), tmp_path / "unet")
    for model in (again, theirs):
        same({"unet": model}, ours, ("unet",))


def theirs(**more: Any) -> dict[str, Any]:
    """A UNet and a text encoder with the PEFT library's adapters, as diffusers' training scripts make them."""
    models = fresh()
    for name, targets in (("unet", UNET), ("text_encoder", CLIP)):
        models[name].requires_grad_(False)
        models[name].add_adapter(peft.LoraConfig(target_modules=targets, **more))
        tiny.shake(models[name], 0.05)
    return models


@pytest.mark.parametrize("more", [{"r": 4, "lora_alpha": 4}, {"r": 2, "lora_alpha": 2, "use_dora": True}])
@pytest.mark.parametrize("style", ["peft", "diffusers"])
def test_files_of_diffusers_load_here(style: str, more: dict[str, Any], tmp_path: Path) -> None:
    made = theirs(**more)
    states = {name: peft.get_peft_model_state_dict(model) for name, model in made.items()}
    if style == "diffusers":
        states = {name: convert_state_dict_to_diffusers(state) for name, state in states.items()}
        assert any("lora.down" in key for key in states["unet"])
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=states["unet"], text_encoder_lora_layers=states["text_encoder"]
    )
    assert sniff(tmp_path) == "diffusers"
    same(load_adapter_file(fresh(), tmp_path), made)


def test_configs_in_the_header_of_diffusers_files_count(tmp_path: Path) -> None:
    made = theirs(r=4, lora_alpha=10, rank_pattern={"to_q": 2, "fc1": 3}, alpha_pattern={"to_k": 3})
    states = {name: peft.get_peft_model_state_dict(model) for name, model in made.items()}
    configs = {}
    for name, model in made.items():
        plain = model.peft_config["default"].to_dict()
        configs[name] = {key: sorted(v) if isinstance(v, set) else v for key, v in plain.items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        unet_lora_adapter_metadata=configs["unet"],
        text_encoder_lora_adapter_metadata=configs["text_encoder"],
    )
    same(load_adapter_file(fresh(), tmp_path), made)


def test_kohya_files_of_diffusers_load_here(tmp_path: Path) -> None:
    made = theirs(r=4, lora_alpha=4)
    state: dict[str, torch.Tensor] = {}
    for name, model in made.items():
        own = {f"{name}.{key}": value for key, value in peft.get_peft_model_state_dict(model).items()}
        state |= convert_state_dict_to_kohya(own)
    save_file(state, tmp_path / "k.safetensors")
    assert any(key.startswith("lora_te1_encoder") for key in state)
    same(load_adapter_file(fresh(), tmp_path / "k.safetensors"), made)


def test_attention_processors_of_the_oldest_files(tmp_path: Path) -> None:
    ours = pair(LoraConfig, ["to_q", "to_out.0"], r=2, lora_alpha=2)
    write_diffusers({"unet": ours["unet"]}, tmp_path / "new.safetensors")
    old = {}
    for key, tensor in load_file(tmp_path / "new.safetensors").items():
        key = key.removeprefix("unet.").replace("to_out.0", "to_out")
        for layer in ("to_q", "to_out"):
            key = key.replace(f".{layer}.lora_A", f".processor.{layer}_lora.down")
            key = key.replace(f".{layer}.lora_B", f".processor.{layer}_lora.up")
        old[key] = tensor
    assert all(".processor.to_" in key for key in old)
    save_file(old, tmp_path / "old.safetensors")
    same(load_adapter_file({"unet": diffusion.unet()}, tmp_path / "old.safetensors"), ours, ("unet",))


def test_lokr_loads_in_the_unet_of_diffusers(tmp_path: Path) -> None:
    for more in (METHODS["lokr"][1], METHODS["lokr-both-modes"][1], METHODS["lokr-whole"][1]):
        ours = tiny.shake(get_peft_model(diffusion.unet(), LoKrConfig(target_modules=UNET, **more)))
        write_diffusers({"unet": ours}, tmp_path / "lokr.safetensors")
        unet = diffusion.unet()
        unet.load_lora_adapter(tmp_path, weight_name="lokr.safetensors", prefix="unet")
        same({"unet": unet}, {"unet": ours}, ("unet",))


# --- SDXL ---------------------------------------------------------------------------------------------------------


def test_sdxl_files_name_blocks_as_kohya_does(tmp_path: Path) -> None:
    targets = [*UNET, "conv2", "proj_out", "linear_2", "conv_out"]
    unet = tiny.shake(get_peft_model(diffusion.unet(xl=True), LoraConfig(target_modules=targets, r=2, lora_alpha=2)))
    one = tiny.shake(get_peft_model(diffusion.encoder(), LoraConfig(target_modules=CLIP)), 0.05)
    two = tiny.shake(
        get_peft_model(diffusion.encoder(True), LoraConfig(target_modules=[*CLIP, "text_projection"])), 0.05
    )
    path = write_kohya({"unet": unet, "text_encoder": one, "text_encoder_2": two}, tmp_path / "xl.safetensors")
    keys = load_file(path).keys()
    starts = {key.split("_text")[0].split("_block")[0].split("_time")[0].split("_label")[0] for key in keys}
    assert {"lora_te1", "lora_te2", "lora_unet_input", "lora_unet_middle", "lora_unet_output"} <= starts
    models = {
        "unet": diffusion.unet(xl=True),
        "text_encoder": diffusion.encoder(),
        "text_encoder_2": diffusion.encoder(True),
    }
    loaded = load_adapter_file(models, path)
    for name, ours in (("unet", unet), ("text_encoder", one), ("text_encoder_2", two)):
        assert (diffusion.answer(loaded[name]) - diffusion.answer(ours)).abs().max() < 1e-5
    # diffusers' own reader gives the same layers.
    state, _ = StableDiffusionXLPipeline.lora_state_dict(str(path), unet_config=unet.config)
    other = diffusion.unet(xl=True)
    own = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
    other.load_lora_adapter(own, prefix=None)
    assert (diffusion.answer(other) - diffusion.answer(unet)).abs().max() < 1e-5


SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize("config", [{"cross_attention_dim": 768}, SDXL], ids=["sd15", "sdxl"])
def test_every_name_of_the_real_unets(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    names = Names(unet, "unet")
    assert len(names.layers) > 250
    every = [name for name, _ in unet.named_modules()]
    state = {}
    for name in names.layers:
        flat = name.replace(".", "_")
        assert by_rule(flat) == names.flat(flat) == name
        original = to_original(name, every)
        assert from_original(original) == flat and names.flat(original) == name
        state[f"lora_unet_{original}.lora_down.weight"] = torch.zeros(1)
        state[f"lora_unet_{original}.lora_up.weight"] = torch.zeros(1)
    if config is SDXL:
        made = _maybe_map_sgm_blocks_to_diffusers(dict(state), unet.config)
        theirs, _ = _convert_non_diffusers_lora_to_diffusers(made)
        flat = {key.replace("_lora.", ".lora.").replace(".processor", "").split(".lora.")[0] for key in theirs}
        assert {name.removeprefix("unet.").replace("to_out", "to_out.0") for name in flat} == names.layers.keys()


def test_names_that_mean_two_layers_are_refused(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = torch.nn.Linear(2, 2)
            self.a = torch.nn.ModuleDict({"b": torch.nn.Linear(2, 2)})

    with pytest.raises(CheckpointError, match=r"a_b or a\.b in Odd"):
        Names(Odd(), "unet").flat("a_b")
