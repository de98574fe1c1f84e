"""This machine: what it has, what a worker takes of it before any model, and what its C allocator keeps. Torch-free.

The constants are measured, not derived: `python -m bench.memory_fit` holds them against whole processes.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from engine import threads

OVERHEAD = {"cpu": 390_000_000, "cuda": 500_000_000}
"""Bytes of a worker beside its tensors: interpreter, torch, transformers, bitsandbytes, what kernels touch and keep. On
CUDA the context alone, which is on the card (not measured here)."""

TOKEN = 600
"""Bytes of a tokenizer for each token that it knows."""

PRODUCT, PRODUCTS = 600_000, 36
"""Bytes that a product in bfloat16 leaves on the CPU for each shape of its matrices, and the shapes of a step."""

SLACK = {"cpu": 0.32, "cuda": 0.0}
"""Share of what a step makes and frees again that stays resident beyond its own peak."""

SLACK_ADAPTER = 0.2
"""Added on the CPU where an adapter's layers have gradients: small blocks that stay between large ones that go."""

SLACK_QUANTISED = 0.2
"""Added on the CPU over a base in codes: weights that are decoded for one product come and go between what stays."""

SLACK_CHECKPOINTING = 2.4
"""All of these with gradient checkpointing on the CPU: what is worked out again is freed between inputs that stay."""

_PACKAGES = ("torch", "transformers", "diffusers", "datasets", "accelerate", "bitsandbytes", "safetensors", "gradio")


def overhead(device: str, vocabulary: int = 0) -> int:
    """Bytes of a worker's process beside the tensors of its job; its tokenizer knows `vocabulary` tokens."""
    return OVERHEAD[device] + (TOKEN * vocabulary if device == "cpu" else 0)


def products(device: str, lengths: int) -> int:
    """Bytes that torch and oneDNN keep for products in bfloat16 whose batches have so many different lengths."""
    return PRODUCT * min(PRODUCTS * lengths, threads.SHAPES) if device == "cpu" else 0


def slack(
    parts: Mapping[str, int],
    device: str,
    checkpointing: bool = False,
    layers: bool = False,
    quantised: bool = False,
) -> int:
    """Bytes that the allocator keeps beyond the step's own peak.

    glibc serves blocks below its threshold (up to 32 MiB) from a heap, whose holes between longer-lived blocks cannot
    be given back; so it grows with what comes and goes, and not with what stays.

    Args:
        parts: bytes of the step's parts.
        device: `cpu` or `cuda`.
        checkpointing: whether activations are worked out again.
        layers: whether an adapter is trained that has weights in the base's layers.
        quantised: whether the base is in codes.
    """
    share = SLACK[device]
    if device == "cpu":
        share += (SLACK_ADAPTER if layers else 0) + (SLACK_QUANTISED if quantised else 0)
        share = SLACK_CHECKPOINTING if checkpointing else share
    return int(share * (parts["gradients"] + parts["activations"] + parts["logits"]))


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory of this machine, or of the container or control group that allows less."""
    total = int(psutil.virtual_memory().total)
    return min([total, *(limit for _, limit in _limits(root))])


def _limits(root: Path) -> Iterator[tuple[Path, int]]:
    """(folder, bytes) of each control group of this process that has a limit."""
    mounts = (root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory")
    for folder in dict.fromkeys((*mounts, *threads.cgroups("memory", root))):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _number(folder / name)
            if limit is not None:
                yield folder, limit


def _unused(folder: Path, limit: int) -> int:
    """What is left of a control group's limit; pages of files that were read are given back when they are wanted."""
    used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
    try:
        told = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        files = int(told.get("inactive_file") or told.get("total_inactive_file") or 0)
    except (OSError, ValueError):
        files = 0
    return max(0, limit - max(0, used - files))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def available(device: str = "cpu", root: Path = Path("/")) -> int:
    """Bytes that a new process could take now."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    return min([int(psutil.virtual_memory().available), *(_unused(*found) for found in _limits(root))])


def held(device: str = "cpu") -> int:
    """Bytes that this process holds: resident memory, or on `cuda` what its allocator has taken of the card."""
    if device == "cuda":
        import torch

        return int(torch.cuda.memory_reserved())
    return int(psutil.Process().memory_info().rss)


def peak(device: str = "cpu") -> int:
    """The most bytes that this process has held so far; on `cuda` of the card."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_reserved())
    # macOS counts bytes, Linux kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe() -> dict[str, Any]:
    """The machine for a person and for a benchmark's file; imports torch."""
    import torch

    from engine.models.loading import auto_precision, default_device

    device = default_device()
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "missing"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": threads.available_cores(),
        "cpus": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory": memory_limit(),
        "available": available(),
        "device": device,
        "precision": auto_precision(device),
        "gpus": [
            {"name": torch.cuda.get_device_name(i), "memory": int(torch.cuda.get_device_properties(i).total_memory)}
            for i in range(torch.cuda.device_count())
        ],
        "packages": packages,
    }


def _processor() -> str:
    """The processor's name as Linux gives it; empty where that cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
