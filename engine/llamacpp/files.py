"""What models and adapters share on their way into GGUF: names, order of rows, precisions, a file written whole."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from engine.checkpoint import draft, publish
from engine.errors import CheckpointError, ConfigError
from engine.llamacpp import FAMILIES

# gguf tells every program that imports it that its files are for little-endian machines.
logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)

KINDS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
ROPES = ("default", "linear", "llama3")
_LARGEST_F16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: its name in GGUF.
        shape: as torch counts, the longest-running dimension last.
        kind: how its numbers are written.
        values: makes it, in float32; called when it is written, so that one at a time is in memory.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    values: Callable[[], Tensor]


def check_family(config: Any) -> None:
    """Refuse a model that is no Llama, or that llama.cpp's Llama would compute in another way.

    Args:
        config: transformers' config of the model.

    Raises:
        ConfigError: with everything that stands against it.
    """
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise ConfigError(
            f"The model is of the family {family!r}, which is not converted to GGUF here.",
            f"Supported: {', '.join(FAMILIES)}. Save the merged model, and convert it with llama.cpp's own script.",
        )
    rope = config.rope_parameters or {}
    faults = []
    if config.hidden_act != "silu":
        faults.append(f"hidden_act is {config.hidden_act!r}; needed: 'silu'")
    if rope.get("rope_type", "default") not in ROPES:
        faults.append(f"the rotary positions are {rope['rope_type']!r}; needed: one of {', '.join(ROPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        faults.append(f"partial_rotary_factor is {rope['partial_rotary_factor']}; needed: 1")
    if getattr(config, "quantization_config", None) is not None:
        faults.append("its weights are quantised; needed: full precision")
    if faults:
        raise ConfigError(
            "The model is a Llama, but not one that llama.cpp's Llama computes:\n"
            + "\n".join(f"- {fault}" for fault in faults),
            "Save the merged model instead.",
        )


def head_width(config: Any) -> int:
    """The width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class Names:
    """GGUF's names for the tensors of one model, and the order of its rows.

    Args:
        config: transformers' config of the model.
    """

    def __init__(self, config: Any) -> None:
        self._map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def of(self, key: str) -> str:
        """GGUF's name of transformers' `key`, such as `model.layers.0.mlp.up_proj.weight`.

        Raises:
            ConfigError: llama.cpp's Llama has no such tensor.
        """
        found = self._map.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(f"llama.cpp's Llama has no tensor for {key}.", "Save the merged model instead.")
        return str(found)

    def rows(self, module: str, tensor: Tensor) -> Tensor:
        """A tensor of `module` with its output rows as llama.cpp wants them.

        Rotary positions turn pairs of a head's rows. transformers pairs row i with row i + width/2, llama.cpp row 2i
        with row 2i + 1, so the rows of queries and keys change places: (heads, 2, width/2) becomes (heads, width/2, 2).
        """
        heads = self._heads.get(module.rpartition(".")[2])
        if heads is None:
            return tensor
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
        return halves.transpose(1, 2).reshape(tensor.shape)


def kind_for(shape: Sequence[int], precision: str) -> gguf.GGMLQuantizationType:
    """How a tensor is written: vectors in float32, rows that do not divide into blocks in f16, all else as asked."""
    if len(shape) < 2:
        return KINDS["f32"]
    kind = KINDS[precision]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return KINDS["f16"] if shape[-1] % block else kind


def numbers(entry: Entry) -> np.ndarray[Any, Any]:
    """The bytes of a tensor.

    Raises:
        ConfigError: it holds numbers that are not finite, or too large for float16.
    """
    values = entry.values().detach().to("cpu", torch.float32).contiguous()
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not np.isfinite(largest):
        raise ConfigError(f"{entry.name} holds numbers that are not finite.", "The model is damaged; train it again.")
    if entry.kind is KINDS["f16"] and largest > _LARGEST_F16:
        raise ConfigError(
            f"{entry.name} holds {largest:.3g}, and float16 ends at {_LARGEST_F16:.0f}.", "Choose bf16 or f32."
        )
    written: np.ndarray[Any, Any] = gguf.quants.quantize(values.numpy(), entry.kind)
    return written


@contextmanager
def whole_file(path: Path, suffix: str = ".gguf") -> Iterator[Path]:
    """A draft beside `path` that gets its name at the end of the block, or is removed after an error.

    Raises:
        CheckpointError: the name does not end in `suffix`.
    """
    if path.suffix != suffix:
        raise CheckpointError(f"{path.name} does not end in {suffix}.", "Name the file to write.")
    path.parent.mkdir(parents=True, exist_ok=True)
    place = draft(path)
    try:
        yield place
        publish(place, path)
    finally:
        place.unlink(missing_ok=True)


def write(
    path: Path,
    describe: Callable[[gguf.GGUFWriter], None],
    entries: Sequence[Entry],
    tell: Callable[[float], None] | None = None,
) -> Path:
    """Write a file of the architecture `llama`; it appears whole or not at all.

    Args:
        path: a name that ends in `.gguf`.
        describe: adds the metadata.
        entries: the tensors, in their order in the file.
        tell: told the share of bytes that is written.

    Raises:
        CheckpointError, ConfigError: as `whole_file` and `numbers`.
    """
    sizes = [_bytes(entry) for entry in entries]
    with whole_file(path) as place:
        writer = gguf.GGUFWriter(place, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
        try:
            describe(writer)
            for entry, size in zip(entries, sizes, strict=True):
                writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, entry.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for entry, size in zip(entries, sizes, strict=True):
                writer.write_tensor_data(numbers(entry))
                done += size
                if tell:
                    tell(done / max(sum(sizes), 1))
        finally:
            writer.close()
    return path


def _bytes(entry: Entry) -> int:
    block, size = gguf.GGML_QUANT_SIZES[entry.kind]
    length: int = math.prod(entry.shape) // block * size
    return length
