"""Bad rows and files by the library, the command line and the studio: a named error or a listed row each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.__main__ import main
from engine.data import load
from engine.errors import DataError
from studio import problem_words
from studio.datasets import Datasets
from studio.store import Store
from tests.test_data_archives import million
from tests.test_data_images import BESIDE, huge_png, png, zipped


def rows(path: Path, *found: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def labelled(path: Path, *labels: Any) -> Path:
    return rows(path, *({"text": f"text {n}", "label": label} for n, label in enumerate(labels)))


def refused(folder: Path) -> dict[str, tuple[str, Path, str]]:
    """name -> (task, data, the code of the error): nothing of it can be used."""
    left, (t, e) = "data-nothing-left", ({"source": "a", "target": ""}, {"source": " ", "target": "a"})
    same, empty = ({"prompt": "q", "chosen": answer, "rejected": "c"} for answer in ("c", ""))
    inner = zipped(folder / "x.zip", BESIDE).read_bytes()
    (folder / "no.zip").write_bytes(b"PK\x03\x04 cut off")
    return {
        "one class": ("classification", labelled(folder / "one.jsonl", *["a"] * 5), "data-classes"),
        "a label for each row": ("classification", labelled(folder / "own.jsonl", *range(30)), "data-classes"),
        "only empty targets": ("seq2seq", rows(folder / "t.jsonl", t), left),
        "only empty sources": ("seq2seq", rows(folder / "e.jsonl", e), left),
        "equal answers": ("preference", rows(folder / "same.jsonl", same), left),
        "only empty answers": ("preference", rows(folder / "empty.jsonl", empty), left),
        "a name that leads out": ("captioning", zipped(folder / "out.zip", {**BESIDE, "../x.png": png()}), "data-zip"),
        "an absolute name": ("captioning", zipped(folder / "abs.zip", {**BESIDE, "/etc/x.png": png()}), "data-zip"),
        "a million entries": ("captioning", million(folder / "million.zip", 2, None), "data-too-large"),
        "a zip in a zip": ("captioning", zipped(folder / "in.zip", {"set.zip": inner}), "data-empty"),
        "only damaged pictures": ("captioning", zipped(folder / "bad.zip", {"a.png": b"x", "a.txt": "a"}), left),
        "only a huge picture": ("text_to_image", zipped(folder / "big.zip", {"a.png": huge_png(), "a.txt": "a"}), left),
        "no zip": ("captioning", folder / "no.zip", "data-zip"),
    }


NAMES = (
    "one class", "a label for each row", "only empty targets", "only empty sources", "equal answers",
    "only empty answers", "a name that leads out", "an absolute name", "a million entries", "a zip in a zip",
    "only damaged pictures", "only a huge picture", "no zip",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_used_is_refused_by_name_on_every_road(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = refused(tmp_path)
    assert tuple(made) == NAMES
    task, path, code = made[name]
    form = "labels" if task == "classification" else None
    with pytest.raises(DataError) as caught:
        load(path, form)
    assert caught.value.code == code and caught.value.hint

    # The base is none: the data are looked at before a model is.
    data = {"path": str(path), "format": form}
    job = {"task": task, "model": "owner/none", "data": data, "adapter": {"method": "lora"}}
    (tmp_path / "job.json").write_text(json.dumps({**job, "training": {"max_steps": 1}}))
    assert main(["train", str(tmp_path / "job.json"), "--out", str(tmp_path / "run"), "--json"]) == 1
    out, err = capsys.readouterr()
    last = json.loads(out.splitlines()[-1])
    assert (last["type"], last["code"], last["message"]) == ("error", code, caught.value.message)
    assert "Traceback" not in err and caught.value.message in err

    sets = Datasets(Store(tmp_path / "home" / "studio.db"), tmp_path / "home")
    try:
        found = sets.bring_in(path)
        fault = (sets.check(found.id, form, {}) if form else found).fault
    except DataError as error:
        fault = error
    assert fault is not None and fault.code == code


MENDED: dict[str, tuple[str, list[dict[str, Any]], str, int]] = {
    "an empty source": ("parallel", [{"source": "a", "target": "b"}, {"source": "", "target": "c"}], "empty-field", 2),
    "an empty target": ("parallel", [{"source": "a", "target": "b"}, {"source": "c", "target": " "}], "empty-field", 2),
    "equal answers": (
        "preferences",
        [{"prompt": "p", "chosen": "c", "rejected": "c "}, {"prompt": "q", "chosen": "c", "rejected": "r"}],
        "same-answers", 1,
    ),
    "an empty worse answer": (
        "preferences",
        [{"prompt": "p", "chosen": "c", "rejected": ""}, {"prompt": "q", "chosen": "c", "rejected": "r"}],
        "empty-field", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MENDED)
def test_a_bad_row_is_listed_with_its_line_and_shown_in_the_studio(tmp_path: Path, name: str) -> None:
    kind, given, code, line = MENDED[name]
    path = rows(tmp_path / "rows.jsonl", *given)
    prepared = load(path)
    assert (prepared.format, prepared.kept, prepared.total) == (kind, 1, 2)
    assert [(p.line, p.code, p.severity) for p in prepared.problems] == [(line, code, "skip")]
    sets = Datasets(Store(tmp_path / "home" / "studio.db"), tmp_path / "home")
    found = sets.bring_in(path).prepared
    assert found is not None and found.problems == prepared.problems
    assert f'<span class="num">{line}</span>' in problem_words.problems(found)


def test_labels_that_are_one_number_in_several_spellings(tmp_path: Path) -> None:
    """1, 1.0 and "1" are one class; "01" is another, as a person may mean it: a note says so, training asks."""
    path = labelled(tmp_path / "rows.jsonl", "1", "01", 1, 1.0, "2", "2", "01")
    prepared = load(path)
    assert [example["labels"] for example in prepared.examples] == [["1"], ["01"], ["1"], ["1"], ["2"], ["2"], ["01"]]
    noted = {p.code: (p.line, p.message) for p in prepared.problems}
    assert noted["changed-label"][0] == 4 and "differ in spelling only" in noted["similar-labels"][1]
    assert "names of 3 classes" in noted["number-labels"][1]


def test_files_that_are_not_looked_at_have_no_line_in_the_studio(tmp_path: Path) -> None:
    sets = Datasets(Store(tmp_path / "home" / "studio.db"), tmp_path / "home")
    found = sets.bring_in(zipped(tmp_path / "set.zip", {**BESIDE, "photo.heic": b"x"})).prepared
    assert found is not None and found.kept == found.total == 2
    page = problem_words.problems(found)
    assert "photo.heic" in page and '<span class="num"></span>' in page
