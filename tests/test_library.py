"""The library of adapters: what it takes in, how it is searched, the bin, mixes, and a thousand in no time."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError, ConfigError, EngineError, UnsafeFileError
from engine.train.job import DataSpec, JobSpec
from studio import adapter_files, states
from studio.adapter_words import cards
from studio.context import Studio
from studio.library import IMPORTED
from studio.store import StateError, UnknownError


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    with contextlib.closing(Studio.open(tmp_path)) as studio:
        yield studio


def tensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A whole safetensors file of zeros."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        length = 4
        for side in shape:
            length *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + length]}
        at += length
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + bytes(at)


KEY = "base_model.model.model.layers.0.self_attn.q_proj."
FILES = {
    adapter_files.CONFIG: json.dumps(
        {"peft_type": "LORA", "r": 4, "target_modules": ["v_proj", "q_proj"], "task_type": "CAUSAL_LM",
         "base_model_name_or_path": "tiny-llama"}
    ).encode(),
    adapter_files.WEIGHTS: tensors({KEY + "lora_A.weight": (4, 8), KEY + "lora_B.weight": (8, 4)}),
}  # fmt: skip


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    path.write_bytes(packed.getvalue())
    return path


def run(studio: Studio, name: str = "captain", adapter: bool = True) -> str:
    spec = JobSpec(model="tiny-llama", data=DataSpec(path="rows.jsonl"), name=name)
    run_id = studio.jobs.submit(spec)
    if adapter:
        write(studio.jobs.folder(run_id) / "adapter")
    studio.store.update_run(run_id, state=states.DONE, started=1.0, ended=2.0)
    return run_id


def imported(studio: Studio, name: str, base: str = "tiny-llama") -> str:
    draft = write(studio.home / "draft")
    return studio.library.add(draft, name, IMPORTED, base, "causal_lm")


def names(studio: Studio, **asked: Any) -> list[str]:
    return [row["name"] for row in studio.library.rows(**asked)]


def test_a_runs_adapter_is_there_with_what_its_files_say_and_the_runs_colour(studio: Studio) -> None:
    run_id = run(studio)
    (row,) = studio.library.rows()
    assert (row["name"], row["base"], row["method"], row["rank"]) == ("captain", "tiny-llama", "lora", 4)
    assert (row["targets"], row["parameters"]) == ("q_proj, v_proj", 64)
    assert row["colour"] == studio.store.run(run_id)["colour"]
    assert studio.library.folder(row) == studio.jobs.folder(run_id) / "adapter"
    assert studio.library.of_run(run_id)["id"] == row["id"]  # type: ignore[index]


def test_no_file_is_opened_twice_and_a_run_that_went_on_is_read_again(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, bare = run(studio), run(studio, "full", adapter=False)
    read: list[Path] = []
    real = adapter_files.facts
    monkeypatch.setattr(adapter_files, "facts", lambda folder: read.append(folder) or real(folder))
    for _ in range(3):
        assert names(studio) == ["captain"]
    assert len(read) == 1
    write(
        studio.jobs.folder(run_id) / "adapter", {adapter_files.CONFIG: FILES[adapter_files.CONFIG].replace(b"4", b"8")}
    )
    studio.library.rename(studio.library.rows()[0]["id"], "my captain")
    studio.store.update_run(run_id, ended=3.0)
    assert [(row["name"], row["rank"]) for row in studio.library.rows()] == [("my captain", 8)]
    assert studio.library.of_run(bare) is None


def test_a_run_in_the_bin_takes_its_adapter_along_and_brings_it_back(studio: Studio) -> None:
    run_id = run(studio)
    adapter = studio.library.rows()[0]["id"]
    studio.store.bin(run_id)
    assert names(studio) == [] and studio.library.count() == 0
    with pytest.raises(UnknownError):
        studio.library.get(adapter)
    studio.store.restore(run_id)
    assert names(studio) == ["captain"]


def test_search_takes_every_word_anywhere_and_no_wildcards(studio: Studio) -> None:
    imported(studio, "50% pirate")
    imported(studio, "parrot", "owner/other")
    assert names(studio, search="PIRATE llama") == ["50% pirate"]
    assert names(studio, search="q_proj") == ["parrot", "50% pirate"]
    assert names(studio, search="0%") == ["50% pirate"] and names(studio, search="p%t") == []
    assert names(studio, base="owner/other") == ["parrot"]
    assert studio.library.bases() == ["owner/other", "tiny-llama"]
    assert names(studio, limit=1) == ["parrot"] and studio.library.count() == 2


def test_the_bin_gives_back_until_it_is_emptied(studio: Studio) -> None:
    run_id = run(studio)
    kept, other = imported(studio, "kept"), studio.library.of_run(run_id)
    assert other is not None
    for adapter in (kept, other["id"]):
        studio.library.bin(adapter)
        with pytest.raises(StateError, match="already"):
            studio.library.bin(adapter)
    assert names(studio) == [] and set(names(studio, deleted=True)) == {"kept", "captain"}
    with pytest.raises(StateError, match="bin"):
        studio.library.usable(kept)
    studio.library.restore(kept)
    assert names(studio) == ["kept"]
    assert studio.library.empty_bin() == 1
    assert not (studio.jobs.folder(run_id) / "adapter").exists() and studio.store.run(run_id)["state"] == states.DONE
    assert studio.library.usable(kept)["name"] == "kept" and names(studio) == ["kept"]


@pytest.mark.parametrize("bad", ["", "../x", "ad-00000000", "run-00000000", None, 7, "ad-zzzzzzzz/../.."])
def test_an_id_that_names_nothing_is_refused_everywhere(studio: Studio, bad: Any) -> None:
    library = studio.library
    calls = (library.get, library.bin, library.restore, library.usable, lambda it: library.rename(it, "x"))
    for call in calls:
        with pytest.raises(UnknownError):
            call(bad)


def test_names_are_one_line_of_text(studio: Studio) -> None:
    adapter = imported(studio, "  plain  ")
    assert studio.library.get(adapter)["name"] == "plain"
    for bad in ("", "   ", "two\nlines", "x" * 121, None, 3):
        with pytest.raises(ConfigError):
            studio.library.rename(adapter, bad)  # type: ignore[arg-type]


def test_a_mix_is_kept_by_name_and_says_when_an_adapter_is_gone(studio: Studio) -> None:
    one, two = imported(studio, "one"), imported(studio, "two")
    first = studio.library.save_mix("calm", "tiny-llama", [(one, 0.5)], {"how": "live"})
    again = studio.library.save_mix("calm", "tiny-llama", [(one, 0.7), (two, -0.3)], {"how": "svd"})
    assert first == again and len(studio.library.mixes()) == 1
    assert studio.library.mix(first)["parts"] == [(one, 0.7), (two, -0.3)]
    studio.library.bin(one)
    found = studio.library.mix(first)
    assert found["parts"] == [(two, -0.3)] and found["missing"] == 1
    studio.library.forget_mix(first)
    for bad in (first, None, "x", True, 10**30, float("inf")):
        with pytest.raises(UnknownError):
            studio.library.mix(bad)  # type: ignore[arg-type]


def test_a_thousand_adapters_are_listed_and_drawn_in_under_a_second(studio: Studio) -> None:
    for number in range(3):
        imported(studio, f"adapter {number}")
    columns = list(studio.store.db.query("SELECT * FROM adapters"))
    with studio.store.exclusive() as db:
        for number in range(1000):
            row = {**columns[number % 3], "id": f"ad-{number:08x}", "name": f"adapter {number}"}
            db.execute(f"INSERT OR IGNORE INTO adapters ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",
                       list(row.values()))  # fmt: skip
    began = time.perf_counter()
    rows = studio.library.rows()
    shown = cards(rows)
    took = time.perf_counter() - began
    print(f"{len(rows)} adapters listed and drawn in {took:.3f} s, {len(shown):,} bytes")
    assert len(rows) == 1003 and took < 1


# --- uploads --------------------------------------------------------------------------------------------------------


def unpack(tmp_path: Path, *paths: Path) -> tuple[str, Path]:
    into = tmp_path / "into"
    into.mkdir()
    return adapter_files.unpack(paths, into), into


def test_a_zip_with_a_folder_in_it_and_loose_files_are_the_same_adapter(tmp_path: Path) -> None:
    deep = {f"my adapter/{name}": content for name, content in FILES.items()}
    form, into = unpack(tmp_path, zipped(tmp_path / "a.zip", {**deep, "my adapter/README.md": b"hello"}))
    assert form == "peft" and sorted(path.name for path in into.iterdir()) == sorted(FILES)
    loose = write(tmp_path / "loose")
    other = tmp_path / "other"
    other.mkdir()
    assert adapter_files.unpack([loose / name for name in FILES], other) == "peft"
    assert adapter_files.facts(other) == adapter_files.facts(into)


def test_a_pipelines_parts_are_taken_whether_the_unet_is_beside_or_above(tmp_path: Path) -> None:
    unet = {adapter_files.CONFIG: FILES[adapter_files.CONFIG],
            adapter_files.WEIGHTS: tensors({"base_model.model.down_blocks.0.to_q.lora_A.weight": (4, 8)})}  # fmt: skip
    for number, root in enumerate(("unet/", "")):
        files = {root + name: content for name, content in unet.items()}
        files |= {f"text_encoder/{name}": content for name, content in FILES.items()}
        into = tmp_path / str(number)
        into.mkdir()
        assert adapter_files.unpack([zipped(tmp_path / f"{number}.zip", files)], into) == "peft"
        assert (into / "text_encoder" / adapter_files.WEIGHTS).is_file()
        assert adapter_files.facts(into).task == "text_to_image" and adapter_files.facts(into).parameters == 32 + 64


def test_kohyas_file_is_known_by_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    path.write_bytes(tensors({"lora_unet_down_blocks_0_to_q.lora_down.weight": (4, 8)}))
    assert unpack(tmp_path, path)[0] == "foreign"


HOSTILE: dict[str, tuple[dict[str, bytes], type[EngineError], str]] = {
    "out of the zip": ({f"../{n}": c for n, c in FILES.items()}, EngineError, "leads out"),
    "absolute": ({"/etc/adapter_config.json": b"{}"}, EngineError, "leads out"),
    "a pickle": ({adapter_files.CONFIG: FILES[adapter_files.CONFIG], "adapter_model.bin": b"\x80\x04."},
                 UnsafeFileError, "pickle"),
    "a lone pickle": ({"style.ckpt": b"\x80\x04."}, UnsafeFileError, "pickle"),
    "two adapters": ({f"{at}/{n}": c for at in "ab" for n, c in FILES.items()}, CheckpointError, "2 adapters"),
    "nothing": ({"README.md": b"hello"}, CheckpointError, "README.md"),
    "cut off": ({**FILES, adapter_files.WEIGHTS: FILES[adapter_files.WEIGHTS][:-9]}, CheckpointError, "damaged"),
    "no safetensors": ({**FILES, adapter_files.WEIGHTS: b"version https://git-lfs"}, CheckpointError, "damaged"),
    "a config that is a list": ({**FILES, adapter_files.CONFIG: b"[]"}, CheckpointError, "no JSON object"),
    "a config too long": ({**FILES, adapter_files.CONFIG: b" " * 3_000_000}, CheckpointError, "bytes long"),
    "weights alone": ({adapter_files.WEIGHTS: FILES[adapter_files.WEIGHTS]}, CheckpointError, "without its"),
    "another model": ({"model.safetensors": tensors({"encoder.weight": (2, 2)})}, CheckpointError, "no adapter"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HOSTILE))
def test_what_is_no_adapter_is_told_and_no_name_of_the_zip_becomes_a_path(tmp_path: Path, name: str) -> None:
    files, kind, words = HOSTILE[name]
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(kind, match=words) as fault:
        unpack(inner, zipped(tmp_path / "bad.zip", files))
    assert fault.value.hint and str(tmp_path) not in str(fault.value)
    assert {path.name for path in tmp_path.iterdir()} == {"inner", "bad.zip"}


def test_a_bomb_is_refused_by_its_promise_and_a_liar_by_its_bytes(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(adapter_files.CONFIG, FILES[adapter_files.CONFIG])
        with archive.open(adapter_files.WEIGHTS, "w", force_zip64=True) as member:
            for _ in range(300):
                member.write(bytes(2**20))
    path = tmp_path / "bomb.zip"
    path.write_bytes(bomb.getvalue())
    with pytest.raises(EngineError, match="longer than"):
        unpack(tmp_path, path)
