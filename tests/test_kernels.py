"""The fused forms against the plain formulas: values and gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import engine
from engine import bnb, kernels
from engine.adapters.dora import DoRAConfig
from engine.adapters.lorafa import LoRAFAConfig
from engine.kernels import gated, linear
from engine.kernels.dropout import Dropout, drawn_seed, mask_like

INPUTS, OUTPUTS, TOKENS = 64, 96, 24
METHODS: dict[str, Any] = {"lora": engine.LoraConfig, "dora": DoRAConfig, "lorafa": LoRAFAConfig}


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.proj(x)
        return result


def base_of(kind: str, outputs: int = OUTPUTS) -> nn.Module:
    if kind == "conv1d":
        return Conv1D(outputs, INPUTS)
    layer = nn.Linear(INPUTS, outputs, bias=kind == "bias")
    return bnb.quantize_model(One(layer), "nf4").proj if kind == "nf4" else layer  # type: ignore[return-value]


def adapted(kind: str, config: Any, dtype: torch.dtype = torch.float32, outputs: int = OUTPUTS) -> Any:
    """A model of one layer with an adapter whose B is not zero."""
    torch.manual_seed(0)
    model = engine.get_peft_model(One(base_of(kind, outputs)), config)
    if dtype is not torch.float32 and kind != "nf4":
        model.get_base_model().proj.base_layer.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.train()


def step(run: Callable[[Tensor], Tensor], model: Any, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients, of the input too, of a fixed loss, always under the same random numbers."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(5)
    out = run(x)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out.float() * weight).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": out.detach(), "input": x.grad, **found}


def compared(model: Any, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> tuple[Any, Any]:
    run = run or model
    fused = step(run, model, x)
    with kernels.disabled():
        plain = step(run, model, x)
    assert fused.keys() == plain.keys() and len(fused) > 2
    return fused, plain


def distance(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


def is_fused(model: Any, x: Tensor) -> bool:
    return "Adapted" in type(model(x.clone().requires_grad_()).grad_fn).__name__


@pytest.mark.parametrize("kind", ["plain", "bias", "conv1d", "nf4"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_the_plain_formula(method: str, kind: str, drop: float) -> None:
    if method == "dora" and kind == "nf4":
        pytest.skip("DoRA needs the norms of the base's rows")
    model = adapted(kind, METHODS[method](r=4, lora_alpha=6, target_modules=["proj"], lora_dropout=drop))
    x = torch.randn(2, TOKENS // 2, INPUTS)
    assert is_fused(model, x)
    fused, plain = compared(model, x)
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5, name


@pytest.mark.parametrize("outputs", [32, 64, 96])
def test_doras_magnitudes_learn_whatever_is_kept_for_them(outputs: int) -> None:
    model = adapted("plain", DoRAConfig(r=4, target_modules=["proj"]), outputs=outputs)
    magnitude = next(p for n, p in model.named_parameters() if "magnitude" in n)
    with torch.no_grad():
        magnitude[3] = 0.0
    fused, plain = compared(model, torch.randn(TOKENS, INPUTS))
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5, name
    (found,) = (value for name, value in fused.items() if "magnitude" in name)
    assert float(found[3]) != 0


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_bf16_errs_no_more_than_the_plain_formula(method: str, drop: float) -> None:
    config = METHODS[method](r=4, lora_alpha=6, target_modules=["proj"], lora_dropout=drop)
    model = adapted("bias", config, torch.bfloat16)
    x = torch.randn(TOKENS, INPUTS).to(torch.bfloat16)
    fused, plain = compared(model, x)
    # The truth: the same numbers and the same mask in float64.
    exact = copy.deepcopy(model)
    exact.get_base_model().proj.base_layer.double()
    state: dict[str, Tensor] = {}
    with kernels.disabled(), masks_of(x, drop):
        state = step(exact, exact, x.double())
    for name, value in state.items():
        assert distance(fused[name], value) < 1.1 * distance(plain[name], value) + 2e-3, name
        assert distance(fused[name], value) < 2e-2, name


@contextlib.contextmanager
def masks_of(x: Tensor, drop: float) -> Any:
    """Dropout in another number format, with the mask that it would have drawn for `x`."""

    def same(self: Dropout, value: Tensor) -> Tensor:
        return value * mask_like(x, drop, drawn_seed(x)).to(value.dtype)

    with pytest.MonkeyPatch.context() as patch:
        if drop:
            patch.setattr(Dropout, "forward", same)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_masks_drop_the_share_they_are_to_and_keep_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.empty(300, 1001, dtype=dtype)
    mask = mask_like(x, p, drawn_seed(x)).float()
    assert mask.unique().numel() == 2
    assert abs(float((mask == 0).float().mean()) - p) < 0.003 and abs(float(mask.mean()) - 1) < 0.01
    # No pattern along rows, nor from one draw to the next.
    again = mask_like(x, p, drawn_seed(x)).float()
    for other in (again, mask.roll(1, 1), mask.roll(1, 0)):
        pair = torch.stack([mask.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_what_a_mask_keeps_grows_by_as_much_as_the_type_can_say(p: float, dtype: torch.dtype) -> None:
    mask = mask_like(torch.empty(50, 3, dtype=dtype), p, 5)
    share = round(p * 65536) / 65536
    assert mask.dtype == dtype and mask.unique().tolist() == [0, float(torch.tensor(1 / (1 - share), dtype=dtype))]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_leave_an_offset(start: str) -> None:
    config = engine.LoraConfig(r=4, target_modules=["proj"], init_lora_weights=start, lora_dropout=0.2, lora_bias=True)
    fused, plain = compared(adapted("plain", config), torch.randn(TOKENS, INPUTS))
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5, name


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize(("kind", "outputs"), [("plain", 64), ("bias", 96), ("plain", 96), ("plain", 32)])
def test_magnitudes_over_a_start_that_leaves_an_offset(start: str, kind: str, outputs: int) -> None:
    """v is computed again from the base in square layers and under a bias, and the offset is a part of it."""
    config = DoRAConfig(r=4, target_modules=["proj"], init_lora_weights=start)
    fused, plain = compared(adapted(kind, config, outputs=outputs), torch.randn(TOKENS, INPUTS))
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5, name


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["plain", "bias"])
def test_an_output_may_be_changed_in_place(method: str, kind: str) -> None:
    model = adapted(kind, METHODS[method](r=4, target_modules=["proj"]), outputs=INPUTS)
    for change in (lambda y: y.relu_(), lambda y: y.add_(1.0), lambda y: y.mul_(2.0)):
        fused, plain = compared(model, torch.randn(2, 3, INPUTS), lambda x, change=change: change(model(x)))  # type: ignore[misc]
        for name, value in plain.items():
            assert distance(fused[name], value) < 1e-5, name


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_a_merge_before_backward_changes_no_gradient(kind: str) -> None:
    model = adapted(kind, engine.LoraConfig(r=4, target_modules=["proj"]))
    x = torch.randn(TOKENS, INPUTS)
    wanted = step(model, model, x)["input"]
    again = x.clone().requires_grad_()
    out = model(again)
    model.merge_adapter()
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    assert again.grad is not None and distance(again.grad, wanted) < 1e-6


def test_numbers_drawn_elsewhere_leave_the_mask_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> Tensor:
        torch.rand(7)
        return mask_like(*args)

    model = adapted("plain", engine.LoraConfig(r=4, target_modules=["proj"], lora_dropout=0.5))
    x = torch.randn(TOKENS, INPUTS)
    wanted = step(model, model, x)
    monkeypatch.setattr("engine.kernels.linear.mask_like", interrupted)
    for name, value in step(model, model, x).items():
        assert distance(value, wanted[name]) < 1e-6, name


def test_a_mask_does_not_depend_on_strides() -> None:
    x = torch.empty(6, 8)
    assert torch.equal(mask_like(x.T.contiguous().T, 0.5, 3), mask_like(x, 0.5, 3))


def test_mixing_weights_and_several_adapters() -> None:
    model = adapted("plain", engine.LoraConfig(r=4, target_modules=["proj"]))
    model.add_adapter("other", DoRAConfig(r=2, target_modules=["proj"]))
    x = torch.randn(TOKENS, INPUTS)
    both, one, half, other = {"default": 1.0, "other": 0.5}, {"default": -0.7}, {"other": 0.5}, {"other": 1.0}
    for weights, fuses in ((both, False), (one, True), (half, False), (other, True)):
        model.set_adapter_weights(weights)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        model.get_base_model().proj.base_layer.requires_grad_(False)
        assert is_fused(model, x) is fuses
        fused, plain = compared(model, x)
        for name, value in plain.items():
            assert distance(fused[name], value) < 1e-5, (name, weights)


def test_checkpointing_draws_the_same_mask_again() -> None:
    model = adapted("plain", engine.LoraConfig(r=4, target_modules=["proj"], lora_dropout=0.5))
    x = torch.randn(TOKENS, INPUTS)
    fused, plain = compared(model, x, lambda value: checkpoint(model, value, use_reentrant=False))  # type: ignore[arg-type,return-value]
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5, name
    assert distance(step(model, model, x)["input"], fused["input"]) < 1e-6


def test_gradients_add_up_over_batches() -> None:
    model = adapted("plain", engine.LoraConfig(r=4, target_modules=["proj"]))
    first, second = torch.randn(2, TOKENS, INPUTS)

    def sums() -> dict[str, Tensor]:
        model.zero_grad()
        for part in (first, second):
            model(part).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    fused = sums()
    with kernels.disabled():
        plain = sums()
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5


def test_lorafa_keeps_no_input() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    model = adapted("plain", LoRAFAConfig(r=4, target_modules=["proj"]))
    x = torch.randn(TOKENS, INPUTS).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    assert not any(tensor.shape == x.shape for tensor in kept)


@pytest.mark.parametrize("how", ["hook", "autocast", "trainable base", "replaced forward", "merged", "functorch"])
def test_what_the_node_cannot_do_is_left_to_the_plain_formula(how: str) -> None:
    model = adapted("plain", engine.LoraConfig(r=4, target_modules=["proj"]))
    layer, x = model.get_base_model().proj, torch.randn(TOKENS, INPUTS)
    base = layer.base_layer
    assert linear.fits(base, x)
    if how == "hook":
        base.register_forward_hook(lambda module, inputs, out: out * 2)
    elif how == "trainable base":
        base.weight.requires_grad_()
    elif how == "replaced forward":
        base.forward = lambda value: nn.functional.linear(value, base.weight * 2)
    elif how == "merged":
        model.merge_adapter()
        assert layer.parts(x) is None
        return
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert not linear.fits(base, x)
        return
    if how == "functorch":
        plain = torch.func.vmap(model)(x)
        assert distance(plain, model(x)) < 1e-5
        return
    assert not linear.fits(base, x)
    fused, plain_values = compared(model, x)
    assert torch.equal(fused["output"], plain_values["output"])


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 50}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def losses(model: Any) -> tuple[float, dict[str, Tensor]]:
    ids = torch.arange(40).view(2, 20)
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_hooks_on_an_adapted_layer_of_a_gated_mlp_are_called() -> None:
    model = engine.get_peft_model(llama(), engine.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    before, _ = losses(model)
    heard: list[int] = []
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    handle = layer.register_forward_hook(lambda module, args, out: heard.append(1) or out * 3)
    changed, _ = losses(model)
    assert heard and changed != pytest.approx(before, rel=1e-6)
    handle.remove()
    assert losses(model)[0] == pytest.approx(before, rel=1e-6)


def test_replicas_of_data_parallel_ask_their_own_weights() -> None:
    config = engine.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = engine.get_peft_model(llama(), config).train()
    block = model.get_base_model().model.layers[0]
    for module in (block.mlp, block.input_layernorm):
        replica: Any = module._replicate_for_data_parallel()
        assert replica.forward.args == (replica,) and module.forward.args == (module,)
        twice = replica._replicate_for_data_parallel()
        assert twice.forward.args == (twice,)
    replica = block.input_layernorm._replicate_for_data_parallel()
    replica.weight = torch.zeros(64)
    assert not replica(torch.randn(1, 3, 64, requires_grad=True)).any()
    copied = copy.deepcopy(model).get_base_model().model.layers[0].mlp
    assert copied.forward.args == (copied,) and copied._replicate_for_data_parallel.args == (copied,)
    model.unload()
    assert "forward" not in block.mlp.__dict__ and "_replicate_for_data_parallel" not in block.mlp.__dict__


def test_models_are_made_where_nothing_has_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.kernels.norm._known", {})
    monkeypatch.setattr("engine.kernels.gated._known", {})
    config = engine.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        engine.get_peft_model(llama(), config)
    made: Any = engine.get_peft_model(llama(), config)
    block = made.get_base_model().model.layers[0]
    assert "forward" in block.mlp.__dict__ and "forward" in block.input_layernorm.__dict__


@pytest.mark.parametrize("drop", [0.0, 0.2])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_whole_model(method: str, act: str, drop: float) -> None:
    config = METHODS[method](r=4, target_modules="all-linear", lora_dropout=drop, task_type="CAUSAL_LM")
    model = engine.get_peft_model(llama(hidden_act=act), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.train()
    mlp = model.get_base_model().model.layers[0].mlp
    assert "GatedDown" in type(mlp(torch.randn(1, 3, 64)).grad_fn).__name__
    loss, found = losses(model)
    with kernels.disabled():
        plain_loss, plain = losses(model)
    assert abs(loss - plain_loss) < 1e-5
    for name, value in plain.items():
        assert distance(found[name], value) < 2e-5, name
    # Copies have a forward pass of their own.
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert abs(losses(model)[0] - loss) < 1e-6 and abs(losses(twin)[0] - loss) > 1e-3


def test_unload_gives_the_mlp_its_own_forward_back() -> None:
    base = llama()
    mlp = base.model.layers[0].mlp
    model = engine.get_peft_model(base, engine.LoraConfig(r=4, target_modules=["down_proj"]))
    assert "forward" in mlp.__dict__
    model.unload()
    assert "forward" not in mlp.__dict__


class Another(nn.Module):
    """Named like a gated MLP, and another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
        return result


def test_an_mlp_with_another_formula_is_left_alone() -> None:
    assert not gated.install(Another())


def saved_bytes(model: Any, x: Tensor) -> int:
    """Bytes that backward keeps, parameters apart."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(inputs_embeds=x, use_cache=False).logits.sum()
    return sum(found.values())


@pytest.mark.parametrize("drop", [0.0, 0.1])
@pytest.mark.parametrize(("method", "limit"), [("lora", 1.1), ("dora", 1.2)])
def test_backward_keeps_little_more_than_for_the_frozen_base(method: str, limit: float, drop: float) -> None:
    changes = {"hidden_size": 256, "intermediate_size": 704, "num_key_value_heads": 4}
    x = torch.randn(1, 128, 256).requires_grad_()
    frozen = saved_bytes(llama(**changes).requires_grad_(False).train(), x)
    config = METHODS[method](r=4, target_modules="all-linear", lora_dropout=drop, task_type="CAUSAL_LM")
    ours = saved_bytes(engine.get_peft_model(llama(**changes), config).train(), x)
    assert ours < limit * frozen


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_compiling_traces_the_plain_formula(method: str) -> None:
    model = adapted("plain", METHODS[method](r=4, target_modules=["proj"]))
    x = torch.randn(TOKENS, INPUTS)
    compiled = step(torch.compile(model, backend="aot_eager"), model, x)
    fused = step(model, model, x)
    for name, value in fused.items():
        assert distance(compiled[name], value) < 1e-5, name
