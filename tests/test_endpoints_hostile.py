"""Every function of the page, called raw: nothing outside the home is read or written, nothing run, nobody killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import hostile
import httpx
import pytest
from hostile import Attacker, Call, Outcome
from small_adapters import finished_run, lora
from studio_server import Running, start

from engine.paths import REPOSITORY
from studio.comparisons import Comparisons
from studio.context import Studio
from studio.datasets import Datasets
from studio.lock import OwnerLock

CANARY = "canary-4f1c-nobody-may-read-this"
TOKEN = "hf_canarytoken00000000000000000000"
OURS = (
    "studio.inference_worker",
    "studio.adapter_worker",
    "studio.worker",
    "engine eval",
    "engine.models.fetch",
    "engine.models.hub",
    "engine.data",
)
"""What the server's processes may start: modules of this repository."""


class _Trip(BaseHTTPRequestHandler):
    """Remembers that somebody called."""

    calls: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.calls.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(CANARY.encode())

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@dataclass
class Target:
    """A studio under attack, and what must not happen to it."""

    running: Running
    home: Path
    outside: Path
    log: Path
    known: dict[str, Any]
    tripwire: str
    bystander: subprocess.Popen[bytes]

    @property
    def secret(self) -> Path:
        return self.outside / "secret.csv"

    def noted(self, *kinds: str) -> list[list[str]]:
        """What the processes did, by kind."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        return [line for line in map(json.loads, lines) if line[0] in kinds]


def snapshot(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file below the folders with its size and time."""
    skipped = {".git", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache"}
    found = {}
    for folder in folders:
        for root, names, files in os.walk(folder):
            names[:] = [name for name in names if name not in skipped]
            for name in files:
                told = os.stat(os.path.join(root, name), follow_symlinks=False)
                found[os.path.join(root, name)] = (told.st_size, told.st_mtime_ns)
    return found


def furnish(home: Path) -> dict[str, Any]:
    """A home with something of everything, so that the calls get past "there is no such thing"; values by name."""
    studio = Studio.open(home)
    rows = home / "rows.csv"
    rows.write_text("prompt,completion\n" + "".join(f"Say {n}.,It is {n}.\n" for n in range(30)), encoding="utf-8")
    dataset = Datasets(studio.store, home).bring_in(rows).id
    run = finished_run(studio, "seed run", lora())
    second = finished_run(studio, "second", lora(), seed=1)
    adapters = [row["id"] for row in studio.library.rows()]
    mix = studio.library.save_mix(
        "seed mix", "tiny-llama", [(adapters[0], 0.5)], {"how": "live", "rank": None, "density": 0.5}
    )
    Comparisons(studio.store, studio.home).add("answers", "tiny-llama", "hello", {}, [])
    studio.close()
    job = {"model": "tiny-llama", "dataset": dataset, "training": {"max_steps": 2}}
    return {
        "run": run,
        "run-id": run,
        "runs": [run, second],
        "adapter": adapters[0],
        "adapters": [[adapters[0], 1.0]],
        "dataset": dataset,
        "base": "tiny-llama",
        "prompt": "hello",
        "job": job,
        "mix": mix,
        "name": "a name",
        "max_new_tokens": 4,
        "columns": {},
        "format": "prompt_completion",
    }


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    root = tmp_path_factory.mktemp("attack")
    home, outside, writable = root / "home", root / "outside", root / "scratch"
    for folder in (home, outside / "model", writable, root / "user"):
        folder.mkdir(parents=True)
    (outside / "secret.csv").write_text(f"prompt,completion\n{CANARY},{CANARY}\n", encoding="utf-8")
    (outside / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": [CANARY]}))
    (outside / "evil_module.py").write_text("raise SystemExit", encoding="utf-8")
    known = furnish(home)
    server = HTTPServer(("127.0.0.1", 0), _Trip)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
    # With the queue's lock in our hands nothing trains; what is queued stays so.
    lock = OwnerLock(home / "queue.lock")
    assert lock.acquire()
    log = root / "tripwire.jsonl"
    running = start(
        home,
        PYTHONPATH=os.pathsep.join([str(REPOSITORY / "tests" / "tripwire"), str(REPOSITORY)]),
        TRIPWIRE_LOG=str(log),
        TRIPWIRE_SECRETS=os.pathsep.join([str(outside), "/etc/passwd", "/etc/shadow", "/proc/self/environ"]),
        TRIPWIRE_WRITABLE=os.pathsep.join(map(str, (home, writable))),
        TMPDIR=str(writable),
        GRADIO_TEMP_DIR=str(writable / "gradio"),
        HOME=str(root / "user"),
        HF_HOME=str(writable / "hf"),
        TORCHINDUCTOR_CACHE_DIR=str(writable / "torch"),
        HF_HUB_OFFLINE="1",
        HF_TOKEN=TOKEN,
    )
    tripwire = f"http://127.0.0.1:{server.server_port}/secret"
    try:
        yield Target(running, home, outside, log, known, tripwire, bystander)
    finally:
        running.process.terminate()
        running.process.wait(30)
        bystander.kill()
        bystander.wait()
        lock.release()
        server.shutdown()


def faults(outcome: Outcome, attacker: Attacker) -> list[Any]:
    """What is wrong with an answer: it tells a secret or a traceback, or a public endpoint met what nobody foresaw."""
    entry, said = attacker.functions[outcome.function], outcome.said
    found = [word for word in (CANARY, TOKEN, "root:x:", "Traceback (most recent") if word in said]
    if entry["api_visibility"] != "private" and "did not foresee" in said:
        found.append("unforeseen")
    told = (entry["api_name"], entry["targets"], repr(outcome.sent)[:300], said[-300:])
    return [(*found, *told)] if found else []


def calls_of(attacker: Attacker, number: int, target: Target) -> list[Call]:
    """One function's share: all parameters hostile at once in turn, then one at a time among usual ones."""
    texts = hostile.texts(target.secret, target.tripwire, target.bystander.pid)
    odd = [*texts, *hostile.values(target.secret, target.tripwire)]
    usual = attacker.usual(number, target.known)
    count = len(usual)
    made: list[Call] = [(number, usual)]
    # Each function meets a share of them, with few parameters a larger one; functions of one shape meet different ones.
    # A form's functions take seconds for what they work out; the public ones bear the brunt.
    form = count > 20
    step = 2 if count <= 2 else 12 if form else 6
    for turn in range(number % step, len(odd), step):
        made.append((number, [odd[(turn + place * 5) % len(odd)] for place in range(count)]))
    kinds = [attacker.components[key]["type"] for key in attacker.functions[number]["inputs"]]
    # A form of a hundred widgets checks them alike; each kind of widget and every place up to the eighth is enough.
    chosen = [place for place in range(count) if place < 8 or kinds[place] not in kinds[8:place]]
    for place in chosen:
        for turn in range(1 if form else 2):
            value = odd[(number * 7 + place * 11 + turn * 9) % len(odd)]
            made.append((number, [value if at == place else it for at, it in enumerate(usual)]))
    return made if count else made[:1]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_no_function_of_the_page_can_be_turned_against_the_machine(target: Target) -> None:
    attacker = Attacker(target.running.address)
    assert len(attacker.functions) > 100 and len(attacker.parameters) > 20
    before = snapshot(target.outside, REPOSITORY)
    refused, found = 0, []
    calls = [call for number in attacker.functions for call in calls_of(attacker, number, target)]
    for outcome in attacker.ask(calls):
        found += faults(outcome, attacker)
        refused += not outcome.success or '"error"' in outcome.said
    assert target.running.process.poll() is None
    assert found == [] and refused > 500
    assert snapshot(target.outside, REPOSITORY) == before
    assert target.bystander.poll() is None and _Trip.calls == []
    assert target.noted("read", "write", "change", "import") == []
    for _, event, argv in target.noted("start"):
        assert event == "subprocess.Popen" and any(name in argv.replace("', '", " ") for name in OURS), argv
    log = target.running.log.read_text(encoding="utf-8", errors="replace")
    assert TOKEN not in log and CANARY not in log
    assert httpx.get(target.running.address, timeout=60).status_code == 200
    (alive,) = attacker.ask([(attacker.named("list_runs"), [])])
    # The seed run itself may have another name by now, or lie in the bin: that is what some of the endpoints are for.
    assert alive.success and '"runs": [{"id": "run-' in alive.said


JOBS: list[dict[str, Any]] = [
    {"model": "{outside}/model"},
    {"model": "./docs"},
    {"model": "docs"},
    {"model": "../../model"},
    {"model": "file://{outside}/model"},
    {"model": "--help"},
    {"model": ["tiny-llama"]},
    {"trust_remote_code": True},
    {"training": {"trust_remote_code": True}},
    {"data": {"path": "{outside}/secret.csv"}},
    {"adapter": {"method": "prompt_tuning", "tokenizer_name_or_path": "{outside}/model"}},
    {"adapter": {"method": "prompt_tuning", "base_model_name_or_path": "{outside}/model"}},
    {"adapter": {"method": "prompt_tuning", "tokenizer_kwargs": {"vocab_file": "{outside}/secret.csv"}}},
    {"adapter": {"method": "lora", "base_model_name_or_path": "~root"}},
    {"training": {"max_steps": float("inf")}},
    {"name": {"a": 1}},
    {"dataset": "{outside}/secret.csv"},
]


@pytest.mark.timeout(300)
def test_a_job_that_would_open_a_folder_or_run_code_is_refused(target: Target) -> None:
    attacker = Attacker(target.running.address)
    number = attacker.named("submit_run")
    for changes in JOBS:
        changes = json.loads(json.dumps(changes).replace("{outside}", str(target.outside)))
        for outcome in attacker.ask([(number, [{**target.known["job"], **changes}])]):
            assert '"error"' in outcome.said or not outcome.success, (changes, outcome.said)
            assert faults(outcome, attacker) == []
    assert target.noted("read", "write", "change") == []


@pytest.mark.timeout(300)
def test_the_servers_own_routes_send_no_file_of_the_machine(target: Target) -> None:
    client = httpx.Client(base_url=target.running.address, timeout=60)
    secret = target.secret
    for path in (
        f"/gradio_api/file={secret}",
        "/gradio_api/file=/etc/passwd",
        f"/gradio_api/file={target.home}/studio.db",
        f"/gradio_api/file=../../../../..{secret}",
        f"/gradio_api/file=file://{secret}",
        f"/gradio_api/file={target.tripwire}",
        f"/gradio_api/proxy={target.tripwire}",
        "/static/../../../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2f..%2fetc%2fpasswd",
        f"/gradio_api/stream/x/y/{secret}/playlist.m3u8",
        "/monitoring",
        "/gradio_api/vibe-code/",
        f"/studio/live?once=true&run={secret}",
        "/studio/live?once=true&run=../../../../etc/passwd&looks=/etc/passwd&language=../../../../etc",
    ):
        answered = client.get(path)
        assert CANARY not in answered.text and "root:" not in answered.text, path
        assert not answered.content.startswith(b"SQLite format"), path
    sent = client.post("/gradio_api/upload", files={"files": ("../../../evil.csv", b"a,b\n1,2\n")})
    assert sent.status_code != 200 or all(
        Path(path).resolve().is_relative_to(target.log.parent / "scratch") for path in sent.json()
    )
    attacker = Attacker(target.running.address)
    for key, entry in attacker.components.items():
        for name in ("ls", "__init__", "preprocess", "as_example", "open_file"):
            if entry["type"] in ("file", "api", "html"):
                body = {"session_hash": "x", "component_id": key, "fn_name": name, "data": ["/etc"]}
                answered = client.post("/gradio_api/component_server", json=body)
                assert answered.status_code >= 400, (entry["type"], name, answered.text)
    assert not list(target.log.parent.rglob("evil.csv*")) or all(
        path.is_relative_to(target.log.parent / "scratch") for path in target.log.parent.rglob("evil.csv*")
    )
    assert _Trip.calls == [] and target.noted("read", "write", "change") == []
