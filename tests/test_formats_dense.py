"""kohya's and LyCORIS's files against the formulas, dense and in float64, written without the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.formats import load_adapter_file, read_kohya
from tests import diffusion

State = dict[str, Tensor]
LAYERS = ["mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in", "time_embedding.linear_1"]
LAYERS += ["down_blocks.0.downsamplers.0.conv", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"]


class Random:
    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * 0.4


def modes(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """K[o, i] = sum over (p, q) of t[p, q] a[p, o] b[q, i], kernel entry by kernel entry."""
    out = torch.zeros(a.shape[1], b.shape[1], *t.shape[2:], dtype=torch.float64)
    for y in range(t.shape[2]):
        for x in range(t.shape[3]):
            out[:, :, y, x] = a.double().T @ t[:, :, y, x].double() @ b.double()
    return out


def kronecker(first: Tensor, second: Tensor) -> Tensor:
    """Blocks: second times each entry of first."""
    rows = [torch.cat([value.double() * second.double() for value in row], dim=1) for row in first]
    return torch.cat(rows, dim=0)


def lora(shape: tuple[int, ...], rand: Random) -> tuple[State, Tensor]:
    down, up = rand(3, *shape[1:]), rand(shape[0], 3, *[1] * (len(shape) - 2))
    change = (up.double().flatten(1) @ down.double().flatten(1)).reshape(shape)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}, change * 2 / 3


def locon(shape: tuple[int, ...], rand: Random) -> tuple[State, Tensor]:
    if len(shape) == 2 or shape[2:] == (1, 1):
        return lora(shape, rand)
    down, mid, up = rand(3, shape[1], 1, 1), rand(3, 3, *shape[2:]), rand(shape[0], 3, 1, 1)
    change = modes(mid, up.flatten(1).T, down.flatten(1))
    return {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, change


def loha(shape: tuple[int, ...], rand: Random) -> tuple[State, Tensor]:
    wide = shape[1:].numel() if isinstance(shape, torch.Size) else 0
    own = {f"hada_w{i}_a": rand(shape[0], 2) for i in "12"} | {f"hada_w{i}_b": rand(2, wide) for i in "12"}
    change = (own["hada_w1_a"].double() @ own["hada_w1_b"].double()) * (
        own["hada_w2_a"].double() @ own["hada_w2_b"].double()
    )
    return {**own, "alpha": torch.tensor(3.0)}, change.reshape(shape) * 3 / 2


def loha_modes(shape: tuple[int, ...], rand: Random) -> tuple[State, Tensor]:
    if len(shape) == 2 or shape[2:] == (1, 1):
        return loha(shape, rand)
    own = {f"hada_w{i}_a": rand(2, shape[0]) for i in "12"} | {f"hada_w{i}_b": rand(2, shape[1]) for i in "12"}
    own |= {f"hada_t{i}": rand(2, 2, *shape[2:]) for i in "12"}
    one, two = (modes(own[f"hada_t{i}"], own[f"hada_w{i}_a"], own[f"hada_w{i}_b"]) for i in "12")
    return {**own, "alpha": torch.tensor(3.0)}, one * two * 3 / 2


def near_square(size: int) -> tuple[int, int]:
    first = max(d for d in range(1, size + 1) if size % d == 0 and d * d <= size)
    return first, size // first


def lokr(shape: tuple[int, ...], rand: Random, both: bool = False, by_modes: bool = False) -> tuple[State, Tensor]:
    (o1, o2), (i1, i2) = near_square(shape[0]), near_square(shape[1])
    kernel = shape[2:]
    own: State = {"alpha": torch.tensor(3.0)}
    rank = 1
    # LyCORIS factors a side only where the rank is below half of its larger dimension.
    if both and rank < max(o1, i1) / 2:
        own |= {"lokr_w1_a": rand(o1, rank), "lokr_w1_b": rand(rank, i1)}
        first = own["lokr_w1_a"].double() @ own["lokr_w1_b"].double()
    else:
        own["lokr_w1"] = rand(o1, i1)
        first = own["lokr_w1"].double()
    if by_modes and kernel and kernel != (1, 1):
        own |= {"lokr_t2": rand(rank, rank, *kernel), "lokr_w2_a": rand(rank, o2), "lokr_w2_b": rand(rank, i2)}
        second = modes(own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
    else:
        wide = i2 * (kernel[0] * kernel[1] if kernel else 1)
        own |= {"lokr_w2_a": rand(o2, rank), "lokr_w2_b": rand(rank, wide)}
        second = (own["lokr_w2_a"].double() @ own["lokr_w2_b"].double()).reshape(o2, i2, *kernel)
    return own, kronecker(first, second) * 3 / rank


def lokr_whole(shape: tuple[int, ...], rand: Random) -> tuple[State, Tensor]:
    """Nothing factored: alpha has no meaning, whatever it is."""
    (o1, o2), (i1, i2) = near_square(shape[0]), near_square(shape[1])
    own = {"lokr_w1": rand(o1, i1), "lokr_w2": rand(o2, i2, *shape[2:]), "alpha": torch.tensor(7.0)}
    return own, kronecker(own["lokr_w1"], own["lokr_w2"])


FORMS: dict[str, Callable[..., tuple[State, Tensor]]] = {
    "lora": lora,
    "locon": locon,
    "loha": loha,
    "loha-modes": loha_modes,
    "lokr": lokr,
    "lokr-both": lambda shape, rand: lokr(shape, rand, both=True),
    "lokr-modes": lambda shape, rand: lokr(shape, rand, both=True, by_modes=True),
    "lokr-whole": lokr_whole,
}


def made(form: str, unet: nn.Module, path: Path) -> nn.Module:
    """Writes the file, and gives a UNet with the changes in its weights."""
    rand, state = Random(), {}
    layers: dict[str, Any] = dict(unet.named_modules())
    with torch.no_grad():
        for name in LAYERS:
            weight = layers[name].weight
            own, change = FORMS[form](weight.shape, rand)
            state |= {f"lora_unet_{name.replace('.', '_')}.{key}": tensor for key, tensor in own.items()}
            weight.copy_(weight.double() + change)
    save_file(state, path)
    return unet


@pytest.mark.parametrize("form", FORMS)
def test_files_mean_what_the_formulas_say(form: str, tmp_path: Path) -> None:
    path = tmp_path / "k.safetensors"
    dense = diffusion.answer(made(form, diffusion.unet(), path))
    loaded = load_adapter_file({"unet": diffusion.unet()}, path)["unet"]
    assert (dense - diffusion.answer(diffusion.unet())).abs().max() > 0.05
    assert (diffusion.answer(loaded) - dense).abs().max() < 1e-5
    assert (diffusion.answer(loaded.merge_and_unload()) - dense).abs().max() < 1e-5
    # Without the model: the same names, shapes and scales.
    part, again = read_kohya(path)["unet"], read_kohya(path, {"unet": diffusion.unet()})["unet"]
    assert part.config == again.config and part.tensors.keys() == again.tensors.keys()


def test_dora_is_the_formula(tmp_path: Path) -> None:
    unet, rand, state = diffusion.unet(), Random(), {}
    layers: dict[str, Any] = dict(unet.named_modules())
    with torch.no_grad():
        for name in LAYERS:
            weight = layers[name].weight
            own, change = lora(weight.shape, rand)
            scale = rand(weight.shape[0]).abs() + 0.5
            new = weight.double() + change
            norms = new.flatten(1).norm(dim=1)
            weight.copy_(new * (scale / norms).view(-1, *[1] * (weight.dim() - 1)))
            own["dora_scale"] = scale.view(-1, *[1] * (weight.dim() - 1))
            state |= {f"lora_unet_{name.replace('.', '_')}.{key}": tensor for key, tensor in own.items()}
    save_file(state, tmp_path / "k.safetensors")
    loaded = load_adapter_file({"unet": diffusion.unet()}, tmp_path / "k.safetensors")["unet"]
    assert (diffusion.answer(loaded) - diffusion.answer(unet)).abs().max() < 1e-5


def test_files_for_linear_layers_serve_1x1_convolutions_and_the_other_way_round(tmp_path: Path) -> None:
    name = "mid_block.attentions.0.proj_in"
    answers = []
    for linear in (False, True):
        unet = diffusion.unet(use_linear_projection=linear)
        weight = dict(unet.named_modules())[name].weight
        assert weight.dim() == (2 if linear else 4)
        for dims in (2, 4):
            rand = Random(4)
            down, up = rand(2, weight.shape[1], *[1] * (dims - 2)), rand(weight.shape[0], 2, *[1] * (dims - 2))
            flat = f"lora_unet_{name.replace('.', '_')}"
            path = tmp_path / f"{linear}{dims}.safetensors"
            save_file({f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}, path)
            loaded = load_adapter_file({"unet": diffusion.unet(use_linear_projection=linear)}, path)["unet"]
            answers.append(diffusion.answer(loaded))
        assert torch.equal(answers[-1], answers[-2])


def test_factors_of_different_rules_are_refused(tmp_path: Path) -> None:
    flat = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_"
    state = {f"{flat}k.lokr_w1": torch.ones(4, 4), f"{flat}k.lokr_w2": torch.ones(8, 8)}
    state |= {f"{flat}v.lokr_w1": torch.ones(2, 2), f"{flat}v.lokr_w2": torch.ones(16, 16)}
    save_file(state, tmp_path / "k.safetensors")
    with pytest.raises(CheckpointError, match="no decompose_factor gives all its shapes"):
        read_kohya(tmp_path / "k.safetensors")
