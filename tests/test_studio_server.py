"""The served studio: quick and torch-free, driven by `gradio_client` from upload to comparison, and hard to break."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from gradio_client import Client, handle_file
from studio_server import Running, serving, start

import app
from engine.paths import REPOSITORY
from engine.train.job import DataSpec, JobSpec
from studio import adapter_api, compare_api, data_api, run_api, shelf_api
from studio.api import Endpoints, _guarded
from studio.context import Studio
from studio.store import Store

TRAINING = {
    "max_steps": 24,
    "batch_size": 2,
    "learning_rate": 3e-3,
    "max_length": 48,
    "eval_every": 12,
    "checkpoint_every": 4,
    "precision": "fp32",
}
ADAPTER = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Client:
    return Client(server.address, verbose=False)


@pytest.fixture(scope="module")
def dataset(client: Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = tmp_path_factory.mktemp("rows") / "numbers.csv"
    lines = [f"What comes after {n}?,After {n} comes {n + 1}. Ahoy!\n" for n in range(60)]
    rows.write_text("Question,Answer\n" + "".join(lines) + "empty,\n", encoding="utf-8")
    answered = client.predict(handle_file(rows), "", api_name="/upload_data")
    assert answered["format"] == "prompt_completion" and answered["columns"]["prompt"] == "Question"
    assert (answered["profile"]["kept"], answered["profile"]["skipped"]) == (60, 1)
    assert answered["problems"][0]["line"] == 62
    return str(answered["dataset"])


def job(dataset: str, **training: Any) -> dict[str, Any]:
    return {
        "model": "tiny-llama",
        "dataset": dataset,
        "adapter": ADAPTER,
        "training": {**TRAINING, **training},
        "data": {"eval_split": 0.1},
    }


def submit(client: Client, dataset: str, **training: Any) -> str:
    answered = client.predict(job(dataset, **training), api_name="/submit_run")
    assert "run" in answered, answered
    return str(answered["run"])


def status(client: Client, run: str) -> dict[str, Any]:
    found: dict[str, Any] = client.predict(run, 0, api_name="/run_status")
    return found


def wait(true: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def losses(client: Client, run: str) -> dict[int, float]:
    """Step -> loss; of a repeated step the newest."""
    return {event["step"]: event["loss"] for event in status(client, run)["events"] if event["type"] == "step"}


def test_the_page_process_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from studio.context import Studio; from studio.shell import create_app; import studio.theme as t;"
        "create_app(Studio.open()); t.theme(), t.css(), t.head();"
        "print([m for m in ('torch', 'transformers', 'accelerate', 'safetensors') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr[-2000:]


def test_no_endpoint_name_is_left_to_chance(client: Client) -> None:
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    expected = {"/upload_data", "/submit_run", "/run_status", "/control_run", "/list_runs", "/compare"}
    expected |= {"/score_run", "/run_scores", "/leaderboard", "/import_adapter", "/download_export"}
    served = (*adapter_api.ENDPOINTS, *compare_api.ENDPOINTS, *run_api.ENDPOINTS, "share_comparison")
    expected |= {f"/{name}" for name in (*served, *shelf_api.ENDPOINTS, *data_api.ENDPOINTS)}
    assert set(named) == expected
    assert all(named[name].get("description") for name in expected)


def test_upload_train_pause_resume_watch_compare_without_a_browser(client: Client, dataset: str) -> None:
    run = submit(client, dataset, max_steps=60)
    wait(lambda: status(client, run)["step"] > 5)
    assert client.predict(run, "pause", api_name="/control_run")["state"] == "pausing"
    wait(lambda: status(client, run)["state"] == "paused")
    paused_at = status(client, run)["step"]
    assert 5 < paused_at < 60
    assert client.predict(run, "resume", api_name="/control_run")["state"] == "queued"
    wait(lambda: status(client, run)["state"] == "done")
    found = losses(client, run)
    assert sorted(found) == list(range(1, 61))
    assert sum(found[step] for step in range(50, 61)) < 0.7 * sum(found[step] for step in range(1, 12))
    answers = list(client.submit("tiny-llama", [run], "What comes after 7?", 3, 0.0, 24, api_name="/compare"))
    last = answers[-1]
    assert last["finished"] and [column["run"] for column in last["columns"]] == [None, run]
    texts = [column["text"] for column in last["columns"]]
    assert all(texts) and texts[0] != texts[1]
    assert len(answers) > 2, "the answers must stream"


def test_a_run_is_scored_stands_on_the_leaderboard_and_says_why_it_cannot_be(
    client: Client, dataset: str, server: Running
) -> None:
    run = submit(client, dataset)
    wait(lambda: status(client, run)["state"] == "done")
    assert client.predict(run, api_name="/run_scores")["state"] is None
    started = client.predict(run, 3, 4, api_name="/score_run")
    assert started["run"] == run and started["held_back"] == 6
    assert client.predict(run, 3, 4, api_name="/score_run")["error"]["code"] == "state"
    assert client.predict(run, 3, 999, api_name="/score_run")["error"]["code"] == "config"

    def ended() -> bool:
        return not client.predict(run, api_name="/run_scores")["live"]

    wait(ended, 240)
    # Another visitor finds the same: nothing of it lived in a page.
    found = Client(server.address, verbose=False).predict(run, api_name="/run_scores")
    assert found["state"] == "done" and found["error"] is None and found["fresh"], found
    values = {(score["who"], score["metric"]): (score["value"], score["rows"]) for score in found["scores"]}
    assert values["adapter", "loss"][0] < values["base", "loss"][0] and found["better"]["loss"] == "adapter"
    assert values["base", "loss"][1] == 6 and values["base", "exact_match"][1] == 4
    assert values["adapter", "loss"][0] == pytest.approx(status(client, run)["eval_loss"], rel=1e-3)
    assert len(found["rows"]) == 3
    assert all(row["wanted"].startswith("After") and row["base"] != row["adapter"] for row in found["rows"])
    assert str(server.log.parent) not in json.dumps(found)

    assert {"dataset": dataset, "task": "causal_lm"} in client.predict(api_name="/leaderboard")["boards"]
    board = client.predict(dataset, "causal_lm", "loss", api_name="/leaderboard")
    first, base = board["rows"]
    assert (first["run"], base["run"]) == (run, None) and board["sense"] == "lower is better"
    size = (server.log.parent / "runs" / run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert first["bytes"] == size > 4 * first["trained"] > 0 and first["seconds"] > 0
    assert first["best_for"] == ["bytes", "trained"]
    for asked in ([dataset, "nonsense", ""], [dataset, "causal_lm", "bleu"], [dataset, ["causal_lm"], ""]):
        assert client.predict(*asked, api_name="/leaderboard")["error"]["code"] == "config", asked

    (server.log.parent / "runs" / run / "adapter" / "adapter_config.json").write_text("{", encoding="utf-8")
    assert "score" in client.predict(run, 0, 1, api_name="/score_run")
    wait(ended, 240)
    failed = client.predict(run, api_name="/run_scores")
    assert failed["state"] == "failed" and failed["error"]["code"] == "checkpoint" and failed["error"]["message"]
    assert failed["scores"] == found["scores"] and not failed["fresh"]


def test_kill_the_worker_then_resume_gives_the_curve_of_an_uninterrupted_run(
    client: Client, dataset: str, server: Running
) -> None:
    whole = submit(client, dataset)
    wait(lambda: status(client, whole)["state"] == "done")
    broken = submit(client, dataset)
    wait(lambda: status(client, broken)["step"] >= 6)
    store = Store(server.log.parent)
    os.kill(store.run(broken)["pid"], signal.SIGKILL)
    wait(lambda: status(client, broken)["state"] == "lost")
    answered = status(client, broken)
    assert answered["error"]["code"] == "lost" and answered["has_checkpoint"]
    client.predict(broken, "resume", api_name="/control_run")
    wait(lambda: status(client, broken)["state"] == "done")
    first, second = losses(client, whole), losses(client, broken)
    assert sorted(second) == sorted(first)
    assert max(abs(first[step] - second[step]) for step in first) < 1e-4


def test_kill_the_server_while_training_then_start_again_finds_the_run_live(tmp_path: Path) -> None:
    first = start(tmp_path)
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,completion\n" + "".join(f"Say {n}.,It is {n}.\n" for n in range(40)), encoding="utf-8")
    try:
        client = Client(first.address, verbose=False)
        dataset = client.predict(handle_file(rows), "", api_name="/upload_data")["dataset"]
        run = submit(client, dataset, max_steps=4000)
        wait(lambda: status(client, run)["step"] > 2)
    finally:
        first.process.kill()
        first.process.wait()
    store = Store(tmp_path)
    pid, at_kill = store.run(run)["pid"], store.run(run)["step"]
    second = start(tmp_path)
    try:
        client = Client(second.address, verbose=False)
        wait(lambda: status(client, run)["step"] > at_kill)
        assert status(client, run)["state"] == "running" and store.run(run)["pid"] == pid
        client.predict(run, "stop", api_name="/control_run")
        wait(lambda: status(client, run)["state"] == "stopped")
        assert status(client, run)["has_adapter"]
        wait(lambda: not psutil.pid_exists(pid))
    finally:
        second.process.terminate()
        second.process.wait(20)
    assert not [p for p in psutil.process_iter() if str(tmp_path) in str(_environment(p).get("STUDIO_HOME"))]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except psutil.Error:
        return {}


@pytest.mark.parametrize(
    ("endpoint", "arguments", "code"),
    [
        ("run_status", ["../../etc/passwd"], "unknown-id"),
        ("run_status", ["run-00000000"], "unknown-id"),
        ("control_run", ["run-00000000", "stop"], "unknown-id"),
        ("control_run", ["run-00000000' OR 1=1 --", "stop"], "unknown-id"),
        ("submit_run", [{"model": "tiny-llama", "dataset": "../x"}], "unknown-id"),
        ("submit_run", [["not", "a", "job"]], "config"),
        ("compare", ["tiny-llama", ["../adapter"], "hi"], "unknown-id"),
        ("compare", ["../../secret", [], "hi"], "unsafe-file"),
        ("compare", ["tiny-llama", [], ""], "prompt"),
        ("compare", ["tiny-llama", [], "word " * 4000], "prompt"),
        ("compare", ["tiny-llama", "run", "hi"], "config"),
        ("compare", ["tiny-llama", [], "hi", 0, 99.0], "config"),
        ("score_run", ["../../etc"], "unknown-id"),
        ("score_run", ["run-00000000"], "unknown-id"),
        ("run_scores", ["run-00000000/scores"], "unknown-id"),
        ("leaderboard", ["../x", "causal_lm"], "unknown-id"),
        ("leaderboard", [None, "causal_lm"], "unknown-id"),
    ],
)
def test_raw_requests_are_refused_by_name(client: Client, endpoint: str, arguments: list[Any], code: str) -> None:
    answered = client.predict(*arguments, api_name=f"/{endpoint}")
    assert answered["error"]["code"] == code, answered
    assert answered["error"]["message"]


def test_a_job_cannot_point_at_files_of_the_server(client: Client, dataset: str) -> None:
    asked = {**job(dataset), "data": {"path": "/etc/passwd"}}
    assert client.predict(asked, api_name="/submit_run")["error"]["code"] == "config"
    asked = {**job(dataset), "adapter": {"method": "nonsense"}}
    assert "adapter.method" in client.predict(asked, api_name="/submit_run")["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"adapter": {"method": ["lora"]}}, "adapter.method"),
        ({"adapter": 5, "preset": "quick"}, "adapter"),
        ({"method": ["lora"]}, "method"),
        ({"task": []}, "task"),
        ({"preset": []}, "preset"),
        ({"preset": {}}, "preset"),
        ({"data": 5}, "data"),
        ({"data": ["eval_split"]}, "data"),
        ({"training": [1]}, "training"),
        ({"name": {}}, "name"),
        ({"quantization": ["none"]}, "quantization"),
        ({"full": []}, "full"),
    ],
)
def test_a_job_with_values_of_the_wrong_kind_is_refused_by_name(
    client: Client, server: Running, dataset: str, changes: dict[str, Any], named: str
) -> None:
    runs = server.log.parent / "runs"
    before = sorted(runs.iterdir()) if runs.is_dir() else []
    answered = client.predict({**job(dataset), **changes}, api_name="/submit_run")
    assert answered["error"]["code"] == "config" and named in answered["error"]["message"], answered
    assert (sorted(runs.iterdir()) if runs.is_dir() else []) == before


def test_an_event_id_of_the_wrong_kind_is_refused_by_name(tmp_path: Path) -> None:
    with contextlib.closing(Studio.open(tmp_path)) as studio:
        run = studio.store.add_run(JobSpec(model="tiny-llama", data=DataSpec(path="rows.jsonl")))
        status_of = _guarded(Endpoints(studio).run_status)
        for since in ("abc", [], {}, True, -1, 2**63, 2.0**63, float("nan"), float("inf")):
            assert status_of(run, since)["error"]["code"] == "config", since
        for since in (0, None, 7, 7.0, 2**63 - 1):
            assert status_of(run, since)["events"] == []


def test_an_error_that_nobody_foresaw_is_logged_and_answered_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Studio.open(tmp_path)) as studio:
        ends = Endpoints(studio)

        def break_down(*_: object, **__: object) -> Any:
            raise sqlite3.OperationalError("disk I/O error")

        monkeypatch.setattr(studio.store, "runs", break_down)
        monkeypatch.setattr(studio.store, "run", break_down)
        answers = [_guarded(ends.list_runs)(), *ends.compare("tiny-llama", ["run-00000000"], "hi")]
        for answered in answers:
            assert set(answered["error"]) == {"code", "message", "hint"}
            assert answered["error"]["code"] == "unexpected" and "Traceback" not in answered["error"]["message"]
        assert caplog.text.count("Traceback") == len(answers) == 2
        (refused,) = ends.compare("tiny-llama", [], 5)  # type: ignore[arg-type]
        assert refused["error"]["code"] == "config"


def test_models_that_cannot_be_used_fail_by_name(client: Client, dataset: str, tmp_path: Path) -> None:
    """A folder with pickles only, a hub id that is not there, names that lead out: the run says so, the page lives."""
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (pickles / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for model, code in (
        (str(pickles), "unsafe-file"),
        ("nobody/no-such-model", "model"),
        ("no-such-built-in", "model"),
        ("../../etc", "unsafe-file"),
        (str(tmp_path / "nowhere"), "unsafe-file"),
    ):
        answered = client.predict({**job(dataset), "model": model}, api_name="/submit_run")
        if "error" not in answered:
            run = str(answered["run"])
            wait(lambda run=run: status(client, run)["state"] == "failed")
            answered = status(client, run)
        assert answered["error"]["code"] == code, (model, answered["error"])
        assert answered["error"]["message"] and answered["error"]["hint"]


def test_a_name_that_leads_out_of_its_folder_is_refused(client: Client, tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("one\n\ntwo\n", encoding="utf-8")
    answered = client.predict(handle_file(rows), "../../evil.txt", api_name="/upload_data")
    assert answered["error"]["code"] == "unsafe-file"


def test_an_upload_by_the_path_of_a_server_file_is_refused(server: Running) -> None:
    body = {"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, ""]}
    request = urllib.request.Request(
        f"{server.address}/gradio_api/call/upload_data",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    event = json.load(urllib.request.urlopen(request, timeout=20))["event_id"]
    stream = urllib.request.urlopen(f"{server.address}/gradio_api/call/upload_data/{event}", timeout=20).read().decode()
    assert "event: error" in stream and "root:" not in stream


def test_a_run_that_cannot_work_fails_in_words_and_the_queue_goes_on(client: Client, dataset: str) -> None:
    bad = {**job(dataset), "adapter": {**ADAPTER, "target_modules": ["no_such_layer"]}}
    run = str(client.predict(bad, api_name="/submit_run")["run"])
    wait(lambda: status(client, run)["state"] == "failed")
    error = status(client, run)["error"]
    assert error["code"] == "target" and "no_such_layer" in error["message"]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "example.org"])
def test_other_addresses_than_loopback_need_a_password(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("STUDIO_AUTH", raising=False)
    assert app.main(["--host", host, "--no-browser"]) == 2
    assert "STUDIO_AUTH" in capsys.readouterr().err
    monkeypatch.setenv("STUDIO_AUTH", "nobody")
    with pytest.raises(SystemExit):
        app.main(["--host", host, "--no-browser"])


def test_a_server_keeps_few_visits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unittest.mock import MagicMock

    from studio import shell, visits

    page = MagicMock()
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path))
    monkeypatch.setattr(shell, "create_app", lambda studio: page)
    assert app.main(["--no-browser"]) == 0
    assert page.launch.call_args.kwargs["state_session_capacity"] == visits.KEPT <= 1000
