"""How many CPU threads a worker uses, and how they wait. Torch-free: this must act before torch is imported.

OpenMP reads its settings once, when torch loads it. Threads that spin while they wait (the default) steal the cores
that the other threads need as soon as anything else runs on the machine; sleeping threads
(`OMP_WAIT_POLICY=passive`) do not. The rule, and the figures behind it, stand in docs/threads.md.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.errors import ConfigError

OVERRIDE = "STUDIO_THREADS"
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
SHAPES = 96
"""Shapes of products that a run remembers whose rows differ in length."""


def available_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may use: its CPU affinity, cut by the container's CPU quota; at least 1.

    Args:
        root: where `proc` and `sys` are looked up; another folder than `/` only in tests.
    """
    cores = _affinity_cores(root)
    quota = _quota(root)
    return max(1, min(cores, math.floor(quota)) if quota else cores)


def worker_environment(threads: int | None = None, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that a worker process must start with.

    The count is the first of: `threads`, `$STUDIO_THREADS`, an `OMP_NUM_THREADS` that the user has set,
    `available_cores()`. Other variables that the user has set already keep their value.

    Args:
        threads: the job's own count.
        environment: what is set already; the process's environment when left out.

    Raises:
        ConfigError: a count that is not a whole number of at least 1.
    """
    current = os.environ if environment is None else environment
    count = _count(threads, current)
    settings = {
        "OMP_WAIT_POLICY": current.get("OMP_WAIT_POLICY") or "passive",
        # The worker encodes rows before it trains, on few cores; the tokenizers' own threads would only warn at a fork.
        "TOKENIZERS_PARALLELISM": current.get("TOKENIZERS_PARALLELISM") or "false",
    }
    return {**settings, **{name: str(count) for name in _COUNTS}}


def apply(threads: int | None = None) -> dict[str, str]:
    """Put `worker_environment(threads)` into this process; call it before torch is imported.

    When torch is there already, its thread count is still set, but how its threads wait can no longer be changed:
    a `RuntimeWarning` says so.

    Returns:
        What was set.
    """
    settings = worker_environment(threads)
    torch = sys.modules.get("torch")
    waits = os.environ.get("OMP_WAIT_POLICY")
    os.environ.update(settings)
    if torch is not None:
        torch.set_num_threads(int(settings["OMP_NUM_THREADS"]))
        if waits != settings["OMP_WAIT_POLICY"]:
            warnings.warn(
                "torch was imported before the thread settings: OMP_WAIT_POLICY no longer takes effect and training "
                "may be several times slower. Call engine.threads.apply() first, or set OMP_WAIT_POLICY=passive.",
                RuntimeWarning,
                stacklevel=2,
            )
    return settings


def keep_few_products() -> None:
    """Bounds what torch and oneDNN remember of products by the shapes of their matrices; before the first product.

    Each shape in bfloat16 leaves 0.6 MB behind, up to 1,024 of them. Where batches differ in length no shape comes back
    soon, and a step has fewer than this many. What the user has set keeps its value.
    """
    for name in _CACHES:
        os.environ.setdefault(name, str(SHAPES))


def _count(threads: int | None, environment: Mapping[str, str]) -> int:
    if threads is not None:
        return _checked(threads, "threads")
    for name in (OVERRIDE, "OMP_NUM_THREADS"):
        if environment.get(name):
            # OpenMP allows one number per nesting level ("4,2"); the outermost is the one that counts here.
            return _checked(environment[name].split(",")[0], name)
    return available_cores()


def _checked(value: int | str, label: str) -> int:
    try:
        count = int(value)
    except ValueError:
        count = 0
    if count < 1 or isinstance(value, bool):
        raise ConfigError(
            f"{label} is {value!r}; needed: a whole number of at least 1.",
            f"Correct it, or leave it out to use the {available_cores()} cores of this machine.",
        )
    return count


def _affinity_cores(root: Path) -> int:
    """Cores behind the CPUs of the affinity mask, two hyperthreads counted once."""
    try:
        cpus = os.sched_getaffinity(0)
    except (AttributeError, OSError):
        return _counted_by_psutil()
    topology = root / "sys/devices/system/cpu"
    siblings = [_read(topology / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in cpus]
    return max(1, len(set(siblings)))


def _counted_by_psutil() -> int:
    import psutil

    return int(psutil.cpu_count(logical=False) or os.cpu_count() or 1)


def _quota(root: Path) -> float | None:
    """CPUs that the cgroup grants (2.5 is two and a half), the smallest on the way to the root; None if unlimited."""
    shares = [share for folder in cgroups("cpu", root) for share in _granted(folder)]
    return min(shares, default=None)


def cgroups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """The folders of this process's control groups for `cpu` or `memory`, its own and those above it."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup" / controller]
        else:
            continue
        for mount in mounts:
            # Inside a container its own path is often not mounted, only the mount's root is; both are asked.
            for folder in [mount / own.strip("/"), *(mount / own.strip("/")).parents]:
                if folder != mount and mount not in folder.parents:
                    break
                yield folder


def _granted(folder: Path) -> list[float]:
    new = (_read(folder / "cpu.max") or "").split()
    if len(new) == 2 and new[0] != "max":
        return [int(new[0]) / int(new[1])]
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if quota and period and int(quota) > 0:
        return [int(quota) / int(period)]
    return []


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
