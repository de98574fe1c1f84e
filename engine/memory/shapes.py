"""A job's model with every shape and no data: the base, its quantised layers, the adapter, as training has them.

Tensors are torch's fakes, which say they lie on the CPU and hold nothing; so operators choose what they choose there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from engine.adapters.base import CONV1D, LINEAR, TaskType, features, layer_kind
from engine.inject import HEADS, matches, replace_module
from engine.models.fetch import resolve
from engine.tasks.base import Loaded, Task
from engine.train.job import JobSpec
from engine.train.trainee import AdapterTrainee, FullTrainee, Trainee

_BLOCK, _NESTED = 64, 256  # values that share a scale, scales that share a scale of their own


class Linear4bit(nn.Linear):
    """bitsandbytes' 4-bit layer with codes of the right size and no values; its own parameter class loses fakes."""

    def __init__(self, base: nn.Module, kind: str, compute: torch.dtype) -> None:
        n_in, n_out = features(base)
        super().__init__(n_in, n_out, bias=False, device="meta")
        self.bias = base.bias  # type: ignore[assignment]
        self.kind, self.compute = kind, compute
        count = n_in * n_out
        blocks = -(-count // _BLOCK)
        self.weight = nn.Parameter(_empty((count + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.absmax = _empty(blocks, dtype=torch.uint8)
        self.absmax2 = _empty(-(-blocks // _NESTED))
        self.offset, self.code, self.code2 = _empty(()), _empty(16), _empty(256)

    @property
    def quant_state(self) -> Any:
        """The scales as bitsandbytes' functions take them."""
        from bitsandbytes import functional

        inner = functional.QuantState(absmax=self.absmax2, code=self.code2, blocksize=_NESTED, dtype=torch.float32)
        return functional.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=_BLOCK,
            quant_type=self.kind,
            dtype=self.compute,
            offset=self.offset,
            state2=inner,
        )

    def forward(self, x: Tensor) -> Tensor:
        import bitsandbytes

        library: Any = bitsandbytes
        bias = None if self.bias is None else self.bias.to(self.compute)
        product: Tensor = library.matmul_4bit(x.to(self.compute), self.weight, bias=bias, quant_state=self.quant_state)
        return product.to(x.dtype)


class Linear8bitLt(nn.Linear):
    """bitsandbytes' 8-bit layer with codes of the right size and no values."""

    def __init__(self, base: nn.Module) -> None:
        n_in, n_out = features(base)
        super().__init__(n_in, n_out, bias=False, device="meta")
        self.bias = base.bias  # type: ignore[assignment]
        self.weight = nn.Parameter(_empty(n_out, n_in, dtype=torch.int8), requires_grad=False)
        self.scales = _empty(n_out)

    def forward(self, x: Tensor) -> Tensor:
        import bitsandbytes

        library: Any = bitsandbytes
        state = library.MatmulLtState()
        state.CB, state.SCB, state.is_training = self.weight, self.scales, self.training
        state.has_fp16_weights = False
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Tensor = library.matmul(x, self.weight, bias=bias, state=state)
        return product


@dataclass(frozen=True)
class Unfetched:
    """In place of the tokenizer of a base that is not on this machine yet: asking what it costs must not fetch it."""

    vocabulary: int
    pad_token_id: int = 0
    eos_token_id: int = 0

    def __len__(self) -> int:
        return self.vocabulary


@dataclass(frozen=True)
class Shaped:
    """A job's model as the loop has it, without data.

    Attributes:
        loaded: the model, with its adapter, and what encodes rows.
        trainee: what is trained. base: the tensors of the base.
        compute: the type of the products where it is not the weights'.
        file_bytes: of the base's weights as its files have them. converted: loading makes others of them.
    """

    loaded: Loaded
    trainee: Trainee
    base: tuple[Tensor, ...]
    compute: torch.dtype | None
    file_bytes: int
    converted: bool


def shaped(spec: JobSpec, task: Task, device: str) -> Shaped:
    """The job's model on fakes.

    Raises:
        EngineError: as the training itself would.
    """
    from engine.inspection import adapter_config
    from engine.model import get_peft_model
    from engine.models.fetch import is_here
    from engine.models.loading import dtype_of
    from engine.train.worker import checkpoint_activations

    wanted = dtype_of(spec.training.precision, device)
    base = _base(spec, task)
    file_bytes = sum(p.numel() * p.element_size() for p in base.parameters())
    kept = torch.float32 if spec.full else wanted
    converted = spec.quantization != "none" or any(p.dtype != kept for p in base.parameters())
    for parameter in base.parameters():
        parameter.data = parameter.data.to(kept)
    if spec.quantization != "none":
        quantise(base, spec, kept)
    if spec.task == "classification":
        _head_in_float32(base)
    if spec.training.gradient_checkpointing:
        checkpoint_activations(base)
    own = {id(tensor) for tensor in _tensors(base)}
    model: Any = base.eval()
    if not spec.full:
        model = get_peft_model(model, adapter_config(spec.adapter, task.task_type, spec.model))
    of_base = tuple(_to_fakes(model, own))
    here = is_here(spec.model)
    loaded = Loaded(model, _tokenizer(spec.model) if here else Unfetched(int(model.config.vocab_size)))
    trainee: Trainee = FullTrainee(loaded, task) if spec.full else AdapterTrainee(model)
    compute = wanted if spec.full and wanted is not torch.float32 else None
    return Shaped(loaded, trainee, of_base, compute, file_bytes, converted)


def stamps(place: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time of change and size of a file, or of the files of a folder."""
    files = [place] if place.is_file() else sorted(file for file in place.iterdir() if file.is_file())
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def _tokenizer(name: str) -> Any:
    """The base's tokenizer, read once for as long as its folder stays as it is."""
    return _read_tokenizer(name, stamps(resolve(name)))


@lru_cache(maxsize=2)
def _read_tokenizer(name: str, files: tuple[tuple[str, int, int], ...]) -> Any:
    from engine.models.loading import load_tokenizer

    return load_tokenizer(name)


def _base(spec: JobSpec, task: Any) -> nn.Module:
    """The base on the meta device, in its own type."""
    from engine.models.loading import meta_model

    def configure(config: Any) -> None:
        config.id2label = dict(enumerate(task.labels))

    base: nn.Module = meta_model(
        spec.model, task=spec.task, configure=configure if spec.task == "classification" else None
    )
    return base


def quantise(base: nn.Module, spec: JobSpec, compute: torch.dtype) -> None:
    """Stand-ins for the layers that transformers would make bitsandbytes' own."""
    from engine import bnb
    from engine.models.loading import kept_whole

    if spec.task == "text_to_image":
        # Not transformers': `bnb.quantize_model` replaces a UNet's layers.
        left = bnb.unfit(base, spec.quantization, torch.device("cpu")) if spec.quantization != "int8" else []
    else:
        theirs, ours = kept_whole(base, spec.quantization, torch.device("cpu"))
        left = [*theirs, *ours]
    if spec.task == "classification":
        left += [*HEADS[TaskType.SEQ_CLS], *(spec.adapter.get("modules_to_save") or ())]
    for name, module in list(base.named_modules()):
        if layer_kind(module) not in (LINEAR, CONV1D) or matches(name, left):
            continue
        made = Linear8bitLt(module) if spec.quantization == "int8" else Linear4bit(module, spec.quantization, compute)
        replace_module(base, name, made)


def _head_in_float32(base: nn.Module) -> None:
    from engine.models.classifiers import in_float32

    for part, module in base.named_children():
        if part in HEADS[TaskType.SEQ_CLS]:
            in_float32(module)


def _empty(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a model's modules hold, registered or not."""
    for module in model.modules():
        for store in (module._parameters, module._buffers, vars(module)):
            yield from (value for value in store.values() if isinstance(value, Tensor))


def _to_fakes(model: nn.Module, own: set[int]) -> list[Tensor]:
    """Replace every meta tensor by a fake on the CPU, shared ones by the same; returns those whose id is in `own`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}
    # The originals, so that no id is given twice.
    former: list[Tensor] = []

    def fake(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in made:
            former.append(tensor)
            made[id(tensor)] = plain = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                # As `nn.Parameter` makes one of a subclass, without another copy of each.
                plain.requires_grad_(tensor.requires_grad)._is_param = True
        return made[id(tensor)]

    for module in model.modules():
        for store in (module._parameters, module._buffers, vars(module)):
            for name, value in list(store.items()):
                if isinstance(value, Tensor):
                    store[name] = fake(value)  # type: ignore[assignment]
    return [tensor for key, tensor in made.items() if key in own]
