"""Stable Diffusion's adapter files in both directions, against diffusers' own loader (which uses the PEFT library)."""

from __future__ import annotations

import json
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import engine
from engine import DoRAConfig, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from engine.errors import CheckpointError, ConfigError, UnsafeFileError
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


# --- headers and errors -------------------------------------------------------------------------------------------


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_header_and_keys_of_kohya_files(tmp_path: Path) -> None:
    ours = pair(LoraConfig, ["to_q", "conv1"], r=4, lora_alpha=6)
    path = write_kohya(ours, tmp_path / "made" / "k.safetensors", dtype=torch.float16)
    assert header(path) == {
        "format": "pt", "ss_network_dim": "4", "ss_network_alpha": "6", "ss_network_module": "networks.lora"
    }  # fmt: skip
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert tensors["lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"].item() == 6
    assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (4, 16, 3, 3)
    same(load_adapter_file(fresh(), path), ours, limit=2e-2)
    assert [file.name for file in path.parent.iterdir()] == ["k.safetensors"]
    lokr = tiny.shake(get_peft_model(diffusion.unet(), LoKrConfig(r=2, alpha=4, target_modules=["to_q"])))
    made = header(write_kohya({"unet": lokr}, tmp_path / "l.safetensors"))
    assert made["ss_network_module"] == "lycoris.kohya" and json.loads(made["ss_network_args"]) == {"algo": "lokr"}


def test_a_second_adapter_joins_a_model_that_has_one(tmp_path: Path) -> None:
    first, second = pair(LoraConfig, r=2), pair(LoHaConfig, r=2)
    path = write_kohya(second, tmp_path / "k.safetensors")
    before = diffusion.answer(first["unet"])
    loaded = load_adapter_file(first, path, "second")
    assert loaded["unet"] is first["unet"] and loaded["unet"].active_adapters == ["second"]
    same(loaded, second)
    first["unet"].set_adapter("default")
    assert torch.equal(diffusion.answer(first["unet"]), before)


def test_missing_alpha_and_alpha_zero_mean_the_rank(tmp_path: Path) -> None:
    ours = pair(LoraConfig, r=4, lora_alpha=4)
    tensors = load_file(write_kohya(ours, tmp_path / "k.safetensors"))
    without = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    zero = {key: tensor * 0 if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    for name, state in (("without", without), ("zero", zero)):
        save_file(state, tmp_path / f"{name}.safetensors")
        same(load_adapter_file(fresh(), tmp_path / f"{name}.safetensors"), ours)


def test_components_that_are_not_given_are_named(tmp_path: Path) -> None:
    ours = pair(LoraConfig, r=2)
    path = write_kohya(ours, tmp_path / "k.safetensors")
    unet = diffusion.unet()
    with pytest.raises(CheckpointError, match="also adapts text_encoder"):
        load_adapter_file({"unet": unet}, path)
    loaded = load_adapter_file({"unet": unet, "text_encoder": None}, path)
    assert list(loaded) == ["unet"]
    same(loaded, ours, ("unet",))


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_unknown_keys_are_all_named_and_nothing_is_attached(form: str, tmp_path: Path) -> None:
    ours = pair(LoraConfig, r=2)
    path = WRITERS[form](ours, tmp_path / "k.safetensors")
    good = load_file(path)
    first = "lora_unet_conv_in" if form == "kohya" else "unet.conv_in"
    for extra, words in (
        ([f"{first}.diff", f"{first}.w_norm"], "2 keys that cannot be used.*conv_in.diff, .*conv_in.w_norm"),
        ([first.replace("conv_in", "conv_up") + next(k for k in good if "conv_in.lora" in k)[len(first) :]], "no such"),
    ):
        save_file({**good, **{key: torch.zeros(1) for key in extra}}, path)
        models = fresh()
        with pytest.raises(CheckpointError, match=words):
            load_adapter_file(models, path)
        assert not any("base_layer" in name for name, _ in models["unet"].named_modules())


def test_failures_leave_every_model_as_it_was(tmp_path: Path) -> None:
    path = write_kohya(pair(LoraConfig, r=2), tmp_path / "k.safetensors")
    tensors = load_file(path)
    wrong = "lora_te_text_model_encoder_layers_1_mlp_fc1.lora_down.weight"
    save_file({**tensors, wrong: torch.zeros(2, 9)}, path)
    models = fresh()
    kept = get_peft_model(diffusion.encoder(), LoraConfig(target_modules=["q_proj"]), "kept")
    for text in (models["text_encoder"], kept):
        with pytest.raises(CheckpointError, match=r"shape \(2, 9\) in the file and \(2, 32\) in the model"):
            load_adapter_file({"unet": models["unet"], "text_encoder": text}, path)
    for model in models.values():
        assert not any("base_layer" in name for name, _ in model.named_modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(kept.peft_config) == ["kept"] == kept.active_adapters
    save_file({key: tensor for key, tensor in tensors.items() if "conv_in.lora_up" not in key}, path)
    with pytest.raises(CheckpointError, match=r"lacks lora_B.weight of the layer conv_in"):
        load_adapter_file(models, path)
    loha = {f"lora_unet_conv_in.hada_w{i}_{s}": torch.zeros(2, 2) for i in "12" for s in "ab"}
    save_file({key: t for key, t in tensors.items() if "conv_in" not in key} | loha, path)
    with pytest.raises(CheckpointError, match="mixes kinds of adapter: loha at 1 layers, lora at 94 layers"):
        load_adapter_file(models, path)


def test_magnitudes_of_the_inputs_are_refused(tmp_path: Path) -> None:
    ours = pair(DoRAConfig, ["to_q"], r=2)
    path = write_kohya({"unet": ours["unet"]}, tmp_path / "k.safetensors")
    tensors = load_file(path)
    scales = {key: tensor for key, tensor in tensors.items() if key.endswith("dora_scale")}
    assert {tensor.shape for tensor in scales.values()} == {(16, 1), (32, 1)}
    save_file({**tensors, **{key: tensor.T.contiguous() for key, tensor in scales.items()}}, path)
    with pytest.raises(CheckpointError, match=r"dora_scale of .* has shape \(1, \d+\)"):
        load_adapter_file({"unet": diffusion.unet()}, path)


def test_what_the_formats_have_no_place_for(tmp_path: Path) -> None:
    path = tmp_path / "k.safetensors"
    for config, words in (
        (engine.IA3Config(target_modules=["to_k"], feedforward_modules=[]), "ia3 adapter"),
        (LoraConfig(target_modules=["to_k", "to_out.0"], bias="lora_only"), "its own bias"),
        (LoraConfig(target_modules=["to_k"], modules_to_save=["conv_out"]), "a module trained in full"),
    ):
        with pytest.raises(ConfigError, match=words):
            write_kohya({"unet": get_peft_model(diffusion.unet(), config)}, path)
    text = get_peft_model(diffusion.encoder(), LoraConfig(target_modules=["token_embedding"]))
    with pytest.raises(ConfigError, match="the embedding embeddings"):
        write_diffusers({"text_encoder": text}, path)
    with pytest.raises(ConfigError, match="models names 'vae'"):
        write_kohya({"vae": text}, path)
    with pytest.raises(CheckpointError, match="does not end in"):
        write_kohya({"text_encoder": text}, tmp_path / "k.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["adapter.bin", "adapter.pt", "adapter.ckpt", "folder", "adapter.safetensors"])
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "opened",))

    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    (path / "adapter.bin" if name == "folder" else path).write_bytes(pickle.dumps(Bomb()))
    error = CheckpointError if name.endswith("safetensors") else UnsafeFileError
    for read in (read_kohya, read_diffusers, lambda where: load_adapter_file(fresh(), where)):
        with pytest.raises(error):
            read(path)
    if not name.endswith("safetensors"):
        with pytest.raises(UnsafeFileError, match="is a pickle"):
            sniff(path)
    else:
        assert sniff(path) is None
    assert not (tmp_path / "opened").exists()


def test_peft_folders_by_component(tmp_path: Path) -> None:
    ours = pair(LoraConfig, r=2)
    for name, model in ours.items():
        model.save_pretrained(tmp_path / name)
    assert sniff(tmp_path) == sniff(tmp_path / "unet") == "peft"
    assert sniff(tmp_path / "unet" / "adapter_model.safetensors") == "peft"
    same(load_adapter_file(fresh(), tmp_path), ours)
    same(load_adapter_file({"unet": diffusion.unet()}, tmp_path / "unet"), ours, ("unet",))
    with pytest.raises(ConfigError, match="holds the adapter of one model"):
        load_adapter_file(fresh(), tmp_path / "unet")
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no adapter file"):
        load_adapter_file(fresh(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="There is no adapter file"):
        sniff(tmp_path / "nowhere.safetensors")
