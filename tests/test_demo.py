"""Demo mode: visitors apart through real HTTP clients, limits, sweeping, and where it listens."""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import psutil
import pytest
from fastapi import Request
from gradio.context import LocalContext
from gradio_client import Client, handle_file
from hostile import Attacker
from small_adapters import finished_run, lora
from studio_server import Running, start

import app
from engine.errors import ConfigError
from engine.paths import REPOSITORY
from engine.train.job import DataSpec, JobSpec
from studio import demo, states, visitors
from studio.comparisons import Comparisons
from studio.context import Studio
from studio.datasets import Datasets
from studio.demo import DemoError, Limits
from studio.store import UnknownError
from studio.sweeping import Sweeper
from studio.visitors import COOKIE, NOBODY, Visitors

TOKEN = "hf_canarytoken00000000000000000000"
SECRET = "the-first-visitors-secret"
LIMITS = "minutes=60,rows=100,steps=4000,waiting=2,upload=20000,tokens=40"


def wait(true: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    running = start(home, STUDIO_DEMO="1", STUDIO_DEMO_LIMITS=LIMITS, HF_TOKEN=TOKEN, STUDIO_INFERENCE_IDLE="600")
    try:
        yield running
    finally:
        running.process.terminate()
        running.process.wait(30)
        Studio.open(home).close()
    # Gradio logs what it refuses, and `callbacks` what a raw value led to; any other through our files is a fault.
    log, ours = running.log.read_text(encoding="utf-8"), (str(REPOSITORY / "studio"), str(REPOSITORY / "engine"))
    told = [part for part in log.split("Traceback")[1:] if "studio/callbacks.py" not in part]
    faults = [part for part in told if any(f"{path}/" in part for path in ours)]
    assert not faults, faults[0][-3000:]


def rows(folder: Path, name: str, count: int = 40) -> Path:
    path = folder / name
    said = "".join(f"What comes after {n}?,After {n} comes {n + 1} {SECRET}\n" for n in range(count))
    path.write_text("prompt,completion\n" + said, encoding="utf-8")
    return path


def job(dataset: str, **training: Any) -> dict[str, Any]:
    usual = {"max_steps": 4, "batch_size": 2, "max_length": 48, "precision": "fp32", "eval_every": 1000}
    return {"model": "tiny-llama", "dataset": dataset, "name": SECRET, "training": {**usual, **training}}


@pytest.fixture(scope="module")
def first(server: Running, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The first visitor, with something of everything."""
    client = Client(server.address, verbose=False)
    path = rows(tmp_path_factory.mktemp("rows"), f"{SECRET}.csv")
    dataset = client.predict(handle_file(path), "", api_name="/upload_data")["dataset"]
    run = client.predict(job(dataset), api_name="/submit_run")["run"]
    wait(lambda: not client.predict(run, 0, api_name="/run_status")["live"])
    assert client.predict(run, 0, api_name="/run_status")["state"] == "done"
    (adapter,) = client.predict(api_name="/list_adapters")["adapters"]
    mix = client.predict("same name", [[adapter["id"], 1.0]], api_name="/save_mix")["mix"]
    work = client.predict(adapter["id"], "peft", api_name="/export_adapter")["work"]
    wait(lambda: not client.predict(work, api_name="/adapter_work")["live"])
    *_, answers = client.submit("tiny-llama", [run], f"hello {SECRET}", 0, 0.0, 8, api_name="/compare")
    assert answers["finished"]
    found = {"client": client, "path": path, "dataset": dataset, "run": run, "adapter": adapter["id"]}
    return {**found, "mix": mix, "work": work}


def test_another_visitor_finds_nothing_by_list_or_by_id(server: Running, first: dict[str, Any]) -> None:
    mine, second = first["client"], Client(server.address, verbose=False)
    lists = (("/list_runs", "runs"), ("/list_datasets", "datasets"), ("/list_adapters", "adapters"))
    for name, key in (*lists, ("/list_mixes", "mixes")):
        assert len(mine.predict(api_name=name)[key]) == 1 and second.predict(api_name=name)[key] == []
    assert second.predict("", "", "", api_name="/leaderboard")["boards"] == []
    run, adapter, dataset = first["run"], first["adapter"], first["dataset"]
    asked: list[tuple[Any, ...]] = [
        (run, 0, "/run_status"),
        (run, "resume", "/control_run"),
        (run, "/delete_run"),
        (run, "/restore_run"),
        (run, 8, 64, "/score_run"),
        (run, "/run_scores"),
        (dataset, "prompt_completion", {}, "/map_dataset"),
        (dataset, "causal_lm", "", "/leaderboard"),
        (job(dataset), "/submit_run"),
        (adapter, "new name", "/rename_adapter"),
        (adapter, "/delete_adapter"),
        (adapter, "/restore_adapter"),
        (adapter, "peft", "/export_adapter"),
        (adapter, "/rank_errors"),
        (adapter, 2, "", "/resize_adapter"),
        ([[adapter, 1.0]], "x", "live", 0, 0.5, "/save_mix_as_adapter"),
        (first["mix"], "/delete_mix"),
        (first["work"], "/adapter_work"),
    ]
    for *values, name in asked:
        assert second.predict(*values, api_name=name)["error"]["code"] == "unknown-id", name
    assert second.predict(first["work"], api_name="/download_export")[1]["error"]["code"] == "unknown-id"
    for stream, values in (("/compare", ("tiny-llama", [run], "hi")), ("/mix", ([[adapter, 1.0]], "hi"))):
        (refused,) = second.submit(*values, api_name=stream)
        assert refused["error"]["code"] == "unknown-id"
    assert mine.predict(run, 0, api_name="/run_status")["state"] == "done"
    assert mine.predict(first["work"], api_name="/download_export")[1] is None
    # What the page of a run listens to, past the callbacks.
    for client, known in ((mine, True), (second, False)):
        asked = {"run": run, "once": "true"}
        told = httpx.get(f"{server.address}/studio/live", params=asked, cookies=dict(client.cookies or {}), timeout=60)
        assert ('{"gone": true}' in told.text) is not known and "data: {" in told.text


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_function_of_the_page_shows_anything_of_another_visitor(server: Running, first: dict[str, Any]) -> None:
    """All of them, private ones too, asked for the first visitor's things by whatever name each calls them."""
    stranger = Attacker(server.address)
    known = {key: value for key, value in first.items() if key not in ("client", "path")}
    known = {**known, "run-id": first["run"], "runs": [first["run"]], "adapters": [[first["adapter"], 1.0]]}
    known |= {"base": "tiny-llama", "prompt": "hi", "job": {}, "max_new_tokens": 4, "columns": {}, "format": "text"}
    ids = [first[key] for key in ("run", "adapter", "dataset", "work", "mix")]
    calls = []
    for number in stranger.functions:
        usual = stranger.usual(number, known)
        calls.append((number, usual))
        calls += [
            (number, [ids[(place + turn) % 5] for place in range(len(usual))]) for turn in range(5 if usual else 0)
        ]
    told = list(stranger.ask(calls))
    assert len(told) == len(calls)
    for outcome in told:
        where = (stranger.functions[outcome.function]["targets"], outcome.sent[:4], outcome.said[-400:])
        assert SECRET not in outcome.said, where
    # Their own page does show it, by the same calls: the test can see.
    owner = Attacker(server.address, client=httpx.Client(timeout=180, cookies=first["client"].cookies))
    opening = [number for number, it in owner.functions.items() if "load" in [name for _, name in it["targets"]]]
    same = [(number, owner.usual(number, known)) for number in opening]
    assert any(SECRET in outcome.said for outcome in owner.ask(same))


def test_the_same_file_and_the_same_name_are_two_visitors_own(server: Running, first: dict[str, Any]) -> None:
    second = Client(server.address, verbose=False)
    dataset = second.predict(handle_file(first["path"]), "other", api_name="/upload_data")["dataset"]
    assert dataset != first["dataset"]
    run = second.predict(job(dataset), api_name="/submit_run")["run"]
    wait(lambda: second.predict(run, 0, api_name="/run_status")["state"] == "done")
    (adapter,) = second.predict(api_name="/list_adapters")["adapters"]
    assert second.predict("same name", [[adapter["id"], 0.5]], api_name="/save_mix")["mix"] != first["mix"]
    assert first["client"].predict(api_name="/list_mixes")["mixes"][0]["parts"][0][0] == first["adapter"]
    assert first["client"].predict(api_name="/list_datasets")["datasets"][0]["name"] == f"{SECRET}.csv"


def test_limits_are_refused_in_words(server: Running, first: dict[str, Any], tmp_path: Path) -> None:
    client, dataset = first["client"], first["dataset"]
    refused = [
        client.predict(handle_file(rows(tmp_path, "long.csv", 150)), "", api_name="/upload_data"),
        client.predict({**job(dataset), "model": "owner/model"}, api_name="/submit_run"),
        client.predict({**job(dataset), "adapter": {"method": "lora", "r": 4096}}, api_name="/submit_run"),
        client.predict(job(dataset, max_steps=4001), api_name="/submit_run"),
        client.predict(job(dataset, max_length=100_000), api_name="/submit_run"),
        client.predict(first["adapter"], "merged", api_name="/export_adapter"),
        client.predict(first["adapter"], "gguf", api_name="/export_adapter"),
        client.predict([handle_file(first["path"])], "", "", api_name="/import_adapter"),
        list(client.submit("tiny-llama", [], "hi", 0, 0.3, 500, api_name="/compare"))[-1],
        list(client.submit("owner/model", [], "hi", api_name="/compare"))[-1],
    ]
    for answered in refused:
        assert answered["error"]["code"] == "demo" and "Duplicate" in answered["error"]["hint"], answered
    with pytest.raises(Exception, match=r"(?i)size|large|413"):
        client.predict(handle_file(rows(tmp_path, "huge.csv", 2000)), "", api_name="/upload_data")


def test_two_at_once_see_no_secrets_and_do_not_block_each_other(server: Running, first: dict[str, Any]) -> None:
    """While one asks long questions and trains, another's reading answers, and no run is spoilt."""
    mine, second = first["client"], Client(server.address, verbose=False)
    other = second.predict(handle_file(first["path"]), "", api_name="/upload_data")["dataset"]
    runs = [(mine, mine.predict(job(first["dataset"], max_steps=30), api_name="/submit_run")["run"])]
    runs.append((second, second.predict(job(other, max_steps=30), api_name="/submit_run")["run"]))
    asked = [
        mine.submit("tiny-llama", [first["run"]], "Tell a story.", 0, 1.5, 40, api_name="/compare") for _ in range(4)
    ]
    read = 0
    while not all(one.done() for one in asked) and read < 200:
        status = second.predict(runs[1][1], 0, api_name="/run_status")
        assert status["state"] in states.ALL and TOKEN not in json.dumps(status)
        read += 1
    assert read >= 3, "the reader waited for the answers"
    assert all(list(one)[-1]["finished"] for one in asked)
    for client, run in runs:
        wait(lambda client=client, run=run: not client.predict(run, 0, api_name="/run_status")["live"])
        status = client.predict(run, 0, api_name="/run_status")
        steps = [event["step"] for event in status["events"] if event["type"] == "step"]
        assert status["state"] == "done" and steps == list(range(1, 31))
    home = server.log.parent
    written = [path for kind in ("*.log", "*.yaml", "*.json", "*.jsonl") for path in home.rglob(kind)]
    assert len(written) > 4
    for path in written:
        assert TOKEN not in path.read_text(encoding="utf-8", errors="replace"), path
    for page in ("/", "/config", "/gradio_api/info"):
        assert TOKEN not in urllib.request.urlopen(server.address + page, timeout=60).read().decode()


def test_nothing_is_pushed_for_a_visitor(server: Running) -> None:
    """The server has a token, but not for visitors: there is no endpoint; `test_hub.py` asks the function."""
    with urllib.request.urlopen(f"{server.address}/gradio_api/info") as answer:
        named = json.load(answer)["named_endpoints"]
    assert "/export_adapter" in named and "/push_adapter" not in named


def test_the_page_says_that_it_is_a_demo(server: Running) -> None:
    config = httpx.get(f"{server.address}/config", timeout=60).text
    assert "This is a demo." in config and "Only you see what you make" in config
    assert "Duplicate this Space" not in config, "that button is for a Space"


# Without a server


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("STUDIO_DEMO", "1")
    visitors.keep_apart()
    yield monkeypatch
    visitors.keep_apart(False)


def test_whoever_did_not_come_through_the_door_sees_nothing(apart: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with contextlib.closing(Studio.open(tmp_path)) as studio:
        with visitors.acting("someone"):
            run = studio.store.add_run(JobSpec(model="tiny-llama", data=DataSpec(path="x")))
            assert [row["id"] for row in studio.store.runs()] == [run]
        assert visitors.present() == NOBODY and studio.store.runs() == []
        with pytest.raises(UnknownError):
            studio.jobs.folder(run)
        assert not studio.store.move(run, [states.QUEUED], states.STOPPED)
        with visitors.everyone():
            assert len(studio.store.runs()) == 1 and studio.store.run(run)["state"] == states.QUEUED


def test_what_a_component_asks_is_asked_by_the_visitor_of_its_request(apart: pytest.MonkeyPatch) -> None:
    def asked(request: Any) -> str | None:
        LocalContext.request.set(request)
        return visitors.present()

    # Gradio hands the plain request on there, not its own one.
    for request in (Request({"type": "http", "studio.visitor": "ann"}), Request({"type": "http"})):
        wanted = request.scope.get("studio.visitor", NOBODY)
        for given in (request, gr.Request(request)):
            assert contextvars.copy_context().run(asked, given) == wanted


def test_a_cookie_is_believed_only_if_this_server_made_it() -> None:
    ours, theirs = Visitors(), Visitors()
    good = ours.cookie("a" * 32)
    assert ours.known(good) == "a" * 32 and ours.last_seen("a" * 32) > 0
    for bad in ("", "a" * 32, "a" * 32 + ".", good[:-1] + "x", theirs.cookie("a" * 32), "é.ü", "." * 90):
        assert ours.known(bad) == ""


def test_sweeping_removes_who_stayed_away_with_files_and_processes(apart: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import subprocess
    import sys

    from studio import process

    known = Visitors()
    with contextlib.closing(Studio.open(tmp_path)) as studio:
        for name in ("gone", "here"):
            with visitors.acting(name):
                found = Datasets(studio.store, tmp_path).bring_in(rows(tmp_path, f"{name}.csv"))
                run = finished_run(studio, name, lora())
                studio.store.update_run(run, dataset=found.id)
                (adapter,) = studio.library.rows()
                studio.library.save_mix("mix", "tiny-llama", [(adapter["id"], 1.0)], {"how": "live"})
                Comparisons(studio.store, studio.home).add("answers", "tiny-llama", name, {}, [])
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        with visitors.everyone():
            gone = next(row["id"] for row in studio.store.runs() if row["name"] == "gone")
            studio.store.update_run(
                gone, state=states.RUNNING, pid=worker.pid, pid_started=process.started_at(worker.pid)
            )
        assert known.known(known.cookie("here")) == "here"
        for name in ("runs", "datasets", "adapters", "mixes", "comparisons"):
            studio.store.db.execute(f"UPDATE {name} SET created = created - 9000")
        sweeper = Sweeper(studio, known, keep=7200)
        assert sweeper.sweep() == 1
        worker.wait(20)
        assert not studio.jobs._place(gone).exists()
        with visitors.acting("gone"):
            assert (
                studio.store.runs() == studio.store.datasets() == studio.library.rows() == studio.library.mixes() == []
            )
        with visitors.acting("here"):
            (row,) = studio.store.runs()
            assert studio.jobs.has_adapter(row["id"]) and studio.library.rows() and studio.library.mixes()
            assert Path(studio.store.datasets()[0]["path"]).is_file() and Comparisons(studio.store, tmp_path).rows()
        assert sweeper.sweep(everything=True) == 1
        assert not any((tmp_path / "runs").iterdir()) and not any((tmp_path / "datasets").iterdir())


def test_a_run_that_had_its_minutes_is_stopped(apart: pytest.MonkeyPatch, tmp_path: Path) -> None:
    apart.setenv("STUDIO_DEMO_LIMITS", "minutes=1")
    row = {"started": time.time() - 61}
    assert "1 minutes" in demo.overdue(row) and demo.overdue({"started": time.time() - 30}) == ""
    apart.setenv("STUDIO_DEMO", "0")
    assert demo.overdue(row) == ""


def test_runs_that_wait_are_counted_by_visitor(apart: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = JobSpec(model="tiny-llama", data=DataSpec(path="x"))
    with contextlib.closing(Studio.open(tmp_path)) as studio:
        for name in ("one", "two"):
            with visitors.acting(name):
                for _ in range(Limits().waiting):
                    studio.jobs.submit(spec)
                with pytest.raises(DemoError, match="waiting or training"):
                    studio.jobs.submit(spec)


@pytest.mark.parametrize("text", ["minutes", "minutes=x", "models=3", "nonsense=4", "rows=-1"])
def test_limits_of_the_environment_are_checked(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIO_DEMO_LIMITS", text)
    with pytest.raises(ConfigError):
        Limits.of_environment()


def test_demo_mode_is_on_where_it_is_asked_or_on_a_space_without_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STUDIO_DEMO", "STUDIO_AUTH", "SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    assert demo.active() is None
    monkeypatch.setenv("SPACE_ID", "someone/studio")
    assert demo.active() is not None
    monkeypatch.setenv("STUDIO_AUTH", "a:b")
    assert demo.active() is None
    monkeypatch.setenv("STUDIO_DEMO", "1")
    assert demo.active() is not None


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        ({"STUDIO_DEMO": "1"}, ["--host", "0.0.0.0"]),
        ({"SPACE_ID": "a/b", "STUDIO_DEMO": "0"}, []),
        ({"SPACE_ID": "a/b", "STUDIO_DEMO": "0"}, ["--host", "0.0.0.0"]),
    ],
)
def test_what_is_not_safe_is_refused(
    environment: dict[str, str],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("STUDIO_DEMO", "STUDIO_AUTH", "SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert app.main([*arguments, "--no-browser"]) == 2
    assert "STUDIO_AUTH" in capsys.readouterr().err


def test_on_a_space_it_listens_for_everybody_with_a_cookie_for_its_frame(tmp_path: Path) -> None:
    running = start(tmp_path, SPACE_ID="someone/studio")
    try:
        listening = [it for it in psutil.Process(running.process.pid).net_connections() if it.status == "LISTEN"]
        assert [it.laddr.ip for it in listening] == ["0.0.0.0"]
        framed = httpx.get(running.address, headers={"x-forwarded-proto": "https"}, timeout=60)
        (cookie,) = framed.headers.get_list("set-cookie")
        assert (
            cookie.startswith(f"{COOKIE}=") and "SameSite=None; Secure; Partitioned" in cookie and "HttpOnly" in cookie
        )
        assert "Duplicate this Space" in httpx.get(f"{running.address}/config", timeout=60).text
    finally:
        running.process.terminate()
        running.process.wait(30)


SPACES = """
import multiprocessing, pickle, threading
def GPU(duration=None):
    def wrap(function):
        def call(*values):
            box = multiprocessing.get_context("fork").SimpleQueue()
            sent = pickle.dumps(values)
            def child():
                thread = threading.Thread(target=lambda: box.put(function(*pickle.loads(sent))))
                thread.start(); thread.join()
            process = multiprocessing.get_context("fork").Process(target=child)
            process.start(); found = box.get(); process.join()
            open({mark!r}, "a").write(f"{{duration}} {{found}}\\n")
            return found
        return call
    return wrap
"""


def test_training_runs_under_the_decorator_of_zerogpu_where_there_is_one(tmp_path: Path) -> None:
    """A stand-in for the package, which does what the real one does: a forked child, a thread, pickles."""
    package, mark, home = tmp_path / "package", tmp_path / "mark", tmp_path / "home"
    package.mkdir()
    (package / "spaces.py").write_text(SPACES.format(mark=str(mark)), encoding="utf-8")
    with contextlib.closing(Studio.open(home)) as studio:
        path = rows(tmp_path, "rows.csv")
        found = Datasets(studio.store, home).bring_in(path)
        data = DataSpec(path=studio.store.dataset(found.id)["path"], format=found.format, columns=found.columns)
        spec = {**job(found.id), "data": {"path": data.path, "format": data.format, "columns": dict(data.columns)}}
        spec.pop("dataset")
        run = studio.jobs.submit(JobSpec.from_dict(spec), found.id)
        os.environ["SPACES_ZERO_GPU"], before = "1", os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = str(package)
        try:
            studio.jobs.start_queue(every=0.5)
            wait(lambda: studio.store.run(run)["state"] not in states.LIVE)
        finally:
            del os.environ["SPACES_ZERO_GPU"]
            os.environ["PYTHONPATH"] = before
        assert studio.store.run(run)["state"] == "done", studio.jobs.log_tail(run)
        assert studio.jobs.has_adapter(run)
        wait(lambda: mark.exists())
        assert mark.read_text() == "120 0\n"
