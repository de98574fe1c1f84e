"""Headers, keys, components and refusals of Stable Diffusion's adapter files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import engine
from engine import DoRAConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from engine.errors import CheckpointError, ConfigError, UnsafeFileError
from engine.formats import load_adapter_file, read_diffusers, read_kohya, sniff, write_diffusers, write_kohya
from tests import diffusion, tiny
from tests.test_formats import WRITERS, fresh, pair, same


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
