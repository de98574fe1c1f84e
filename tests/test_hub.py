"""Pushing to the hub: a real worker against a real HTTP server that answers as the hub does. No hub is reached."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Hub, listening
from safetensors.numpy import load
from small_adapters import finished_run, lora

from engine import PromptTuningConfig
from engine.errors import ConfigError
from studio import cards, exporting, hub, states
from studio.adapter_api import AdapterEndpoints
from studio.context import Studio
from studio.demo import DemoError
from studio.hub import HubError

TOKEN = "hf_right"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with contextlib.closing(Studio.open(tmp_path_factory.mktemp("home"))) as studio:
        finished_run(studio, "parrot", lora(), 1)
        finished_run(studio, "words", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), 2)
        yield studio
        studio.works.stop()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and a server's environment that has a token for it."""
    with listening() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield found


def adapter(studio: Studio, name: str = "parrot") -> str:
    return str(next(row["id"] for row in studio.library.rows() if row["name"] == name))


def ended(studio: Studio, work: str) -> dict[str, Any]:
    deadline = time.monotonic() + 180
    while studio.works.present() is not None:
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
    return studio.works.get(work)


def pushed(studio: Studio, repository: str = "me/parrot", **asked: Any) -> dict[str, Any]:
    row = ended(studio, exporting.push(studio, adapter(studio), repository, **asked))
    assert row["state"] == states.DONE, (row["error"], studio.works.log_tail(row["id"]))
    return row


def failed(studio: Studio, repository: str = "me/parrot", **asked: Any) -> dict[str, str]:
    row = ended(studio, exporting.push(studio, adapter(studio), repository, **asked))
    assert row["state"] == states.FAILED, row
    assert not (studio.works.folder(row["id"]) / "push").exists()
    return dict(row["error"])


def kept_in(studio: Studio, text: str) -> list[str]:
    """The files of the home folder that hold a text: database, logs, works.

    Another process reads them, for one that closes a database's file lets go of the locks that it holds on it.
    """
    found = subprocess.run(["grep", "-rlaF", "--", text, str(studio.home)], capture_output=True, text=True, check=False)
    return found.stdout.splitlines()


def test_an_adapter_arrives_whole_in_a_private_repository(studio: Studio, server: Hub) -> None:
    row = pushed(studio)
    assert row["result"]["url"] == f"{server.address}/me/parrot"
    kept = server.repositories["me/parrot"]
    assert kept["private"] is True
    assert set(kept["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert set(exporting.pushed_files(studio, adapter(studio))) == set(kept["files"])
    source = studio.library.folder(studio.library.get(adapter(studio)))
    assert kept["files"]["adapter_model.safetensors"] == (source / "adapter_model.safetensors").read_bytes()
    assert load(kept["files"]["adapter_model.safetensors"])
    config = json.loads(kept["files"]["adapter_config.json"])
    assert config["r"] == 4 and config["base_model_name_or_path"] == "tiny-llama"
    head = yaml.safe_load(kept["files"]["README.md"].decode().split("---")[1])
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "text-generation"
    assert server.commits == ["Upload parrot"]
    assert not (studio.works.folder(row["id"]) / "push").exists()


def test_the_token_travels_in_the_authorization_header_alone_and_is_kept_nowhere(
    studio: Studio, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = secret = "hf_secret_that_must_not_be_seen"
    monkeypatch.setenv("HF_TOKEN", secret)
    row = pushed(studio, "me/quiet")
    asked = [it for it in server.requests if "authorization" in it.headers]
    assert len(asked) >= 4 and {it.headers["authorization"] for it in asked} == {f"Bearer {secret}"}
    for it in server.requests:
        others = {name: value for name, value in it.headers.items() if name != "authorization"}
        assert secret not in it.path and secret.encode() not in it.body and secret not in str(others)
    # The storage that the hub names for large files is another machine, and gets no token.
    assert [it for it in server.requests if it.method == "PUT"]
    assert all("authorization" not in it.headers for it in server.requests if it.method == "PUT")
    assert kept_in(studio, "me/quiet") and not kept_in(studio, secret)
    assert secret not in str(row) and secret not in str(AdapterEndpoints(studio).adapter_work(row["id"]))
    server.refuse = {"create": (403, "no")}
    assert secret not in str(failed(studio, "me/quiet-too"))
    assert not kept_in(studio, secret)


def test_a_merged_model_arrives_with_its_card_and_may_be_public(studio: Studio, server: Hub) -> None:
    pushed(studio, "me/whole", what="merged", private=False)
    kept = server.repositories["me/whole"]
    assert kept["private"] is False
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(kept["files"])
    assert "_name_or_path" not in json.loads(kept["files"]["config.json"])
    card = kept["files"]["README.md"].decode()
    assert "AutoModelForCausalLM.from_pretrained(" in card and '"me/whole"' in card and "merged" in card
    assert str(studio.home).encode() not in b"".join(kept["files"].values())


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("create", 401, "does not accept the server's token"),
        ("create", 403, "may not write to me on the hub"),
        ("preupload", 403, "may not write to me on the hub"),
        ("create", 400, "status 400. It says: bad wish"),
        ("commit", 413, "status 413. It says: bad wish"),
        ("lfs/", 403, "may not write to me on the hub"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(
    studio: Studio, server: Hub, where: str, status: int, words: str
) -> None:
    server.refuse = {where: (status, "bad wish")}
    error = failed(studio)
    assert error["code"] == "hub" and words in error["message"] and error["hint"]


def test_a_wrong_token_and_a_hub_that_is_not_there(
    studio: Studio, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "hf_another"
    assert "(401)" in failed(studio)["message"]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        error = failed(studio)
    assert error["code"] == "hub" and "cannot be reached" in error["message"] and "refused" in error["message"]


def test_a_name_that_is_taken_is_never_written_to(studio: Studio, server: Hub) -> None:
    server.repositories["me/parrot"] = {"private": True, "files": {"mine.bin": b"kept"}}
    error = failed(studio)
    assert "me/parrot is taken" in error["message"] and "1 files in it" in error["message"]
    assert server.repositories["me/parrot"]["files"] == {"mine.bin": b"kept"} and not server.commits
    # Others would see what was to be private.
    server.repositories["me/open"] = {"private": False, "files": {}}
    assert "not as private as asked" in failed(studio, "me/open")["message"] and not server.commits


def test_an_upload_that_broke_off_can_be_tried_again(studio: Studio, server: Hub) -> None:
    server.refuse = {"commit": (400, "bad wish")}
    failed(studio)
    assert server.repositories["me/parrot"]["files"] == {}
    server.refuse = {}
    pushed(studio)
    assert len(server.repositories["me/parrot"]["files"]) == 3


def test_nothing_is_pushed_without_a_token_offline_unencrypted_or_in_the_demo(
    studio: Studio, server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no(words: str, kind: type[Exception] = HubError) -> None:
        with pytest.raises(kind, match=words):
            exporting.push(studio, adapter(studio), "me/parrot")

    monkeypatch.delenv("HF_TOKEN")
    # What somebody logged in with on this machine is not the server's.
    (tmp_path / "token").write_text("hf_file")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    no("no token")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
    assert not hub.refusal()
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_one\nhf_two")
    no("characters that no token has")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    no("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    no("not https")
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("STUDIO_DEMO", "1")
    assert "demo" in hub.refusal()
    no("off in the demo", DemoError)
    assert not server.requests


@pytest.mark.parametrize(
    "name", ["", "parrot", "me/", "/parrot", "a/b/c", "me/../x", "me/par rot", "me/x.git", "-me/x", "me/a--b", None, 3]
)
def test_a_repository_has_an_owner_and_a_name(studio: Studio, server: Hub, name: Any) -> None:
    with pytest.raises(ConfigError, match="needed: owner/name"):
        exporting.push(studio, adapter(studio), name)
    assert not server.requests


def test_what_cannot_be_pushed_is_refused_before_anything_starts(studio: Studio, server: Hub) -> None:
    with pytest.raises(ConfigError, match="no weight that it could be merged into"):
        exporting.push(studio, adapter(studio, "words"), "me/words", "merged")
    with pytest.raises(ConfigError, match="'gguf' cannot be pushed"):
        exporting.push(studio, adapter(studio), "me/x", "gguf")
    with pytest.raises(ConfigError, match="needed: true or false"):
        exporting.push(studio, adapter(studio), "me/x", "peft", "no")
    assert not server.requests and hub.checked_repository(" me/par_rot-1.0 ") == "me/par_rot-1.0"


def test_a_card_names_nothing_of_this_machine(studio: Studio, tmp_path: Path) -> None:
    row = {**studio.library.get(adapter(studio)), "base": str(tmp_path / "secret" / "my llama"), "name": "a <b> *c*"}
    card = cards.card(row, "adapter")
    assert str(tmp_path) not in card and "my llama" in card and "base_model:" not in card
    assert "# a \\<b\\> \\*c\\*" in card
    known = cards.card({**row, "base": "smollm2-135m-instruct"}, "adapter", "me/x")
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in known and '"me/x"' in known
    folder = tmp_path / "out"
    folder.mkdir()
    cards.lay_out_adapter(row, studio.library.folder(studio.library.get(adapter(studio))), folder, "me/x")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "my llama"
