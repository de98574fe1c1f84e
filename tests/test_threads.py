"""The count of CPU threads: the rule, its overrides, containers, and when it is too late."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import threads
from engine.errors import ConfigError
from engine.paths import REPOSITORY


def machine(root: Path, cgroup: str = "", files: dict[str, str] | None = None, pairs: bool = False) -> Path:
    """A `proc` and `sys` as Linux shows them, for the CPUs that this process may use."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for cpu in os.sched_getaffinity(0):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        first = cpu - cpu % 2 if pairs else cpu
        (topology / "thread_siblings_list").write_text(f"{first}-{first + 1}" if pairs else f"{cpu}")
    for name, text in (files or {}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_memory_of_a_control_group(tmp_path: Path) -> None:
    """Its own limit and those above it; what is used of them is gone, but for pages of files."""
    from engine.memory.machine import available, memory_limit

    group = "sys/fs/cgroup/slurm/job/memory"
    files = {
        "sys/fs/cgroup/slurm/memory.max": "9000000",
        f"{group}.max": "4000000",
        f"{group}.current": "3000000",
        f"{group}.stat": "anon 1\ninactive_file 500000\n",
    }
    root = machine(tmp_path, "0::/slurm/job\n", files)
    assert memory_limit(root) == 4_000_000
    assert available(root=root) == 1_500_000
    assert memory_limit(machine(tmp_path / "free", "0::/\n")) > 9_000_000


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)


@pytest.mark.usefixtures("four_cpus")
class TestAvailableCores:
    def test_one_a_core(self, tmp_path: Path) -> None:
        assert threads.available_cores(machine(tmp_path)) == 4

    def test_hyperthreads_count_once(self, tmp_path: Path) -> None:
        assert threads.available_cores(machine(tmp_path, pairs=True)) == 2

    def test_without_topology_every_cpu_counts(self, tmp_path: Path) -> None:
        assert threads.available_cores(tmp_path) == 4

    def test_new_cgroup_quota(self, tmp_path: Path) -> None:
        files = {"sys/fs/cgroup/box/cpu.max": "250000 100000"}
        assert threads.available_cores(machine(tmp_path, "0::/box", files)) == 2

    def test_quota_of_a_group_above(self, tmp_path: Path) -> None:
        inner = "sys/fs/cgroup/box/job/cpu.max"
        files = {"sys/fs/cgroup/box/cpu.max": "200000 100000", inner: "350000 100000"}
        assert threads.available_cores(machine(tmp_path, "0::/box/job", files)) == 2

    def test_own_path_not_mounted_in_the_container(self, tmp_path: Path) -> None:
        files = {"sys/fs/cgroup/cpu.max": "100000 100000"}
        assert threads.available_cores(machine(tmp_path, "0::/machine/abc", files)) == 1

    def test_old_cgroup_quota(self, tmp_path: Path) -> None:
        place = "sys/fs/cgroup/cpu,cpuacct/box/"
        files = {place + "cpu.cfs_quota_us": "150000", place + "cpu.cfs_period_us": "50000"}
        assert threads.available_cores(machine(tmp_path, "3:cpu,cpuacct:/box\n2:memory:/x", files)) == 3

    def test_less_than_a_core_is_one_thread(self, tmp_path: Path) -> None:
        files = {"sys/fs/cgroup/cpu.max": "50000 100000"}
        assert threads.available_cores(machine(tmp_path, "0::/", files)) == 1

    def test_unlimited(self, tmp_path: Path) -> None:
        files = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
        assert threads.available_cores(machine(tmp_path, "3:cpu:/", files)) == 4


class TestWorkerEnvironment:
    def test_default(self) -> None:
        cores = str(threads.available_cores())
        assert threads.worker_environment(environment={}) == {
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": cores,
            "MKL_NUM_THREADS": cores,
        }

    @pytest.mark.parametrize(
        ("job", "environment", "count"),
        [
            (3, {"STUDIO_THREADS": "5", "OMP_NUM_THREADS": "7"}, "3"),
            (None, {"STUDIO_THREADS": "5", "OMP_NUM_THREADS": "7"}, "5"),
            (None, {"OMP_NUM_THREADS": "7,2"}, "7"),
        ],
    )
    def test_order_of_the_overrides(self, job: int | None, environment: dict[str, str], count: str) -> None:
        settings = threads.worker_environment(job, environment)
        assert (settings["OMP_NUM_THREADS"], settings["MKL_NUM_THREADS"]) == (count, count)

    def test_what_the_user_set_stays(self) -> None:
        assert threads.worker_environment(environment={"OMP_WAIT_POLICY": "active"})["OMP_WAIT_POLICY"] == "active"

    @pytest.mark.parametrize("wrong", ["0", "-2", "many", "1.5"])
    def test_wrong_counts_name_the_variable(self, wrong: str) -> None:
        with pytest.raises(ConfigError, match="STUDIO_THREADS"):
            threads.worker_environment(environment={"STUDIO_THREADS": wrong})


def run(code: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_", "STUDIO_"))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=clean, timeout=120
    )


def test_apply_before_torch_sets_the_count_without_importing_it() -> None:
    result = run(
        "import sys; from engine import threads; threads.apply(1); assert 'torch' not in sys.modules\n"
        "import torch, os; print(torch.get_num_threads(), os.environ['OMP_WAIT_POLICY'])"
    )
    assert (result.stdout.split(), result.stderr) == (["1", "passive"], "")


def test_apply_after_torch_warns_and_still_sets_the_count() -> None:
    result = run("import torch; from engine import threads; threads.apply(1); print(torch.get_num_threads())")
    assert result.stdout.split() == ["1"]
    assert "imported before the thread settings" in result.stderr


SHAPES = """
import ctypes, sys, torch
from engine import threads
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c d e f used free keep".split()]
libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Info
if sys.argv[1] == "few":
    threads.keep_few_products()
def product(rows):
    torch.mm(torch.ones(rows, 128, dtype=torch.bfloat16), torch.ones(128, 128, dtype=torch.bfloat16))
product(10)
before = libc.mallinfo2().used
for rows in range(100, 400):
    product(rows)
print(libc.mallinfo2().used - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the GNU C library's heap")
def test_shapes_of_products_are_forgotten() -> None:
    script = ["-c", SHAPES]
    clean = {key: value for key, value in os.environ.items() if "CACHE_CAPACITY" not in key}
    grown = [
        int(subprocess.run([sys.executable, *script, how], capture_output=True, text=True, cwd=REPOSITORY, env=clean,
                           timeout=120, check=True).stdout)
        for how in ("few", "all")
    ]  # fmt: skip
    # A processor whose products remember nothing has nothing to forget.
    assert grown[1] < 1 << 20 or grown[0] < 0.6 * grown[1]


def test_what_is_kept_of_shapes_is_the_users_choice_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    # Set first, so that it is taken away again afterwards.
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    del os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    threads.keep_few_products()
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("7", "96")


@pytest.mark.parametrize(
    ("model", "task", "few"), [("tiny-llama", "causal_lm", True), ("tiny-sd", "text_to_image", False)]
)
def test_runs_whose_batches_differ_in_length_keep_few(
    model: str, task: str, few: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from engine.train import worker
    from engine.train.events import Recorder
    from engine.train.job import DataSpec, JobSpec

    class Enough(Exception):
        pass

    def stop() -> None:
        raise Enough

    def examples(*_: object) -> None:
        raise KeyError

    monkeypatch.setattr(threads, "keep_few_products", stop)
    monkeypatch.setattr(worker, "examples_of", examples)
    spec = JobSpec(model=model, task=task, data=DataSpec(path="none"))
    with pytest.raises(Enough if few else KeyError):
        worker.run(spec, tmp_path / "out", Recorder(), SimpleNamespace(poll=lambda: None))
