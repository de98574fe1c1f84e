"""Data sets in the studio: versions by fixes, history, several files, the bin, pages of rows, and the endpoints."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.data import NothingLeftError
from engine.errors import ConfigError, DataError
from engine.train.job import DataSpec, JobSpec
from studio import data_rows, data_words, dataset_files, problem_words, states, token_panel, token_words
from studio import dataset_shelf as shelf
from studio.context import Studio
from studio.data_api import DataEndpoints
from studio.datasets import Datasets
from studio.store import StateError, UnknownError

ROWS = ["question,answer", "a,1", "b,2", "a,1", "c,", "a,9", "안녕, 반가워 "]


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    with contextlib.closing(Studio.open(tmp_path / "home")) as opened:
        yield opened


@pytest.fixture
def sets(studio: Studio) -> Datasets:
    return Datasets(studio.store, studio.home)


def csv(path: Path, lines: list[str] = ROWS) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def kept(found: Any) -> tuple[int, int, int]:
    assert found.prepared.kept + found.prepared.skipped == found.prepared.total
    return found.prepared.kept, found.prepared.skipped, found.prepared.total


def test_a_fix_is_a_new_version_of_an_unchanged_file_and_can_be_taken_back(sets: Datasets, tmp_path: Path) -> None:
    first = sets.bring_in(csv(tmp_path / "rows.csv"))
    raw = Path(sets.store.dataset(first.id)["path"]).read_bytes()
    assert kept(first) == (5, 1, 6) and first.id == first.file
    second = sets.fix(first.id, "duplicate", "skip")
    third = sets.fix(second.id, "empty-field", "fill:nothing")
    assert kept(second) == (4, 2, 6) and kept(third) == (5, 1, 6)
    assert len({first.id, second.id, third.id}) == 3 and third.file == first.id
    assert [row["id"] for row in sets.store.datasets()] == [third.id]
    back = sets.fix(third.id, "duplicate", "")
    assert kept(back) == (6, 0, 6) and dict(back.fixes) == {"empty-field": "fill:nothing"}
    assert sets.fix(back.id, "empty-field", "").id == first.id
    assert [row["id"] for row in sets.store.datasets()] == [first.id]
    assert Path(sets.store.dataset(third.id)["path"]).read_bytes() == raw == (tmp_path / "rows.csv").read_bytes()
    told = [(one["kind"], one.get("before"), one.get("after")) for one in shelf.history(sets.store, first.file)]
    assert told == [
        ("unfixed", 6, 5), ("unfixed", 5, 6), ("fixed", 4, 5), ("fixed", 5, 4), ("brought", None, None),
    ]  # fmt: skip


def test_a_fix_that_leaves_nothing_changes_nothing(sets: Datasets, tmp_path: Path) -> None:
    found = sets.bring_in(csv(tmp_path / "rows.csv", ["question,answer", "a,1", "a,2"]))
    with pytest.raises(NothingLeftError):
        sets.fix(found.id, "other-answer", "skip-all")
    with pytest.raises(DataError):
        sets.fix(found.id, "orphan", "skip")
    assert [(row["id"], row["fixes"]) for row in sets.store.datasets()] == [(found.id, {})]


def test_the_same_file_comes_back_with_its_fixes_its_name_and_out_of_the_bin(sets: Datasets, tmp_path: Path) -> None:
    path = csv(tmp_path / "rows.csv")
    fixed = sets.fix(sets.bring_in(path).id, "duplicate", "skip")
    shelf.rename(sets.store, fixed.id, "  my rows ")
    shelf.into_bin(sets.store, fixed.id)
    assert sets.store.datasets() == [] and [row["name"] for row in shelf.in_bin(sets.store)] == ["my rows"]
    again = sets.bring_in(path.rename(tmp_path / "other.csv"))
    assert (again.id, again.name, kept(again)) == (fixed.id, "my rows", (4, 2, 6))
    assert shelf.history(sets.store, again.file)[0]["name"] == "other.csv" and not shelf.in_bin(sets.store)
    with pytest.raises(ConfigError):
        shelf.rename(sets.store, fixed.id, " ")


def test_another_reading_keeps_the_fixes_and_is_told(sets: Datasets, tmp_path: Path) -> None:
    fixed = sets.fix(sets.bring_in(csv(tmp_path / "rows.csv")).id, "duplicate", "skip")
    turned = sets.check(fixed.id, "prompt_completion", {"prompt": "answer", "completion": "question"})
    assert turned.id == fixed.id and turned.prepared is not None and turned.prepared.examples[0]["prompt"] == "1"
    assert kept(turned) == (4, 2, 6) and shelf.history(sets.store, fixed.file)[0]["kind"] == "read"
    assert sets.open(fixed.id).columns == {"prompt": "answer", "completion": "question"}


def test_a_guess_stays_a_guess_until_a_person_has_said(sets: Datasets, tmp_path: Path) -> None:
    path = csv(tmp_path / "x.csv", ["name,colour", "x,red", "y,blue"])
    assert sets.bring_in(path).guessed and sets.bring_in(path).guessed
    found = sets.check(sets.bring_in(path).id, "prompt_completion", {"prompt": "name", "completion": "colour"})
    assert not found.guessed and not sets.open(found.id).guessed


def test_what_a_run_needs_is_not_deleted_under_it_and_its_file_stays(
    studio: Studio, sets: Datasets, tmp_path: Path
) -> None:
    found = sets.bring_in(csv(tmp_path / "rows.csv"))
    newer = sets.fix(found.id, "duplicate", "skip")
    run = studio.store.add_run(JobSpec(model="tiny-llama", data=DataSpec("x")), found.id)
    with pytest.raises(StateError, match="have not ended"):
        shelf.into_bin(sets.store, newer.id)
    studio.store.update_run(run, state=states.DONE)
    shelf.into_bin(sets.store, newer.id)
    with pytest.raises(StateError):
        shelf.into_bin(sets.store, newer.id)
    other = sets.bring_in(csv(tmp_path / "other.csv", ["question,answer", "x,y"]))
    shelf.into_bin(sets.store, other.id)
    gone, left = shelf.empty(sets.store, sets.folder)
    assert [row["id"] for row in gone] == [other.id] and [row["id"] for row in left] == [newer.id]
    assert not (sets.folder / other.file).exists() and Path(sets.store.dataset(found.id)["path"]).is_file()
    with pytest.raises(UnknownError):
        sets.store.dataset(other.id)
    assert [one["id"] for one in shelf.runs(sets.store, found.file)] == [run]
    shelf.take_out(sets.store, found.file)
    assert [row["id"] for row in sets.store.datasets()] == [newer.id]


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


def test_pictures_with_their_words_become_one_set_whatever_the_order(sets: Datasets, tmp_path: Path) -> None:
    paths = []
    for name, content in (
        ("cats_,_one.png", png("red")), ("cats_,_one.txt", b"a red cat"), ("cats_,_two.png", png("blue")),
        ("cats_,_two.txt", b"a blue cat"), ("cats_,_dark_,_one.png", png("black")), ("cats_,_notes.md", b"x"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        paths.append(tmp_path / name)
    brought = dataset_files.bring_in(sets, paths)
    (found,) = brought.sets
    assert (found.name, found.format, kept(found)) == ("cats", "images", (2, 1, 3)) and len(brought.joined) == 6
    assert found.prepared is not None and dict(found.prepared.counts) == {"no-caption": 1, "unused-file": 1}
    assert dataset_files.bring_in(sets, paths[::-1]).sets[0].id == found.id
    alone = dataset_files.bring_in(sets, [paths[0]]).sets[0]
    assert alone.format == "pictures" and alone.prepared is not None and alone.prepared.kept == 1


def test_tables_of_one_shape_are_joined_and_others_stay_apart(sets: Datasets, tmp_path: Path) -> None:
    head = ["question,answer", "a,1", "b,2,3"]
    one, two = csv(tmp_path / "one.csv", head), csv(tmp_path / "two.csv", ["question,answer", "c,3", "a,1"])
    joined = dataset_files.bring_in(sets, [two, one])
    assert joined.joined == ("one.csv", "two.csv") and kept(joined.sets[0]) == (3, 1, 4)
    assert joined.sets[0].prepared is not None and joined.sets[0].prepared.counts["duplicate"] == 1
    three = csv(tmp_path / "three.csv", ["text,label", "x,p", "y,q"])
    (tmp_path / "broken.csv").write_bytes(b"")
    (tmp_path / "notes.md").write_bytes(b"x")
    apart = dataset_files.bring_in(sets, [one, three, tmp_path / "broken.csv", tmp_path / "notes.md"])
    assert [found.format for found in apart.sets] == ["prompt_completion", "labels"]
    assert [name for name, _ in apart.refused] == ["broken.csv"] and apart.left_alone == ("notes.md",)
    told = data_words.brought(apart)
    assert "broken.csv" in told and "notes.md" in told and data_words.brought(dataset_files.bring_in(sets, [one])) == ""
    for name, words in (("a.txt", "one\ntwo\n"), ("b.txt", "three")):
        (tmp_path / name).write_text(words, encoding="utf-8")
    texts = dataset_files.bring_in(sets, [tmp_path / "a.txt", tmp_path / "b.txt"]).sets[0]
    assert texts.prepared is not None and [row["text"] for row in texts.prepared.examples] == ["one", "two", "three"]
    with pytest.raises(DataError):
        dataset_files.bring_in(sets, [tmp_path / "broken.csv", tmp_path / "notes.md"])


def test_rows_come_by_pages_and_words_find_them(sets: Datasets, tmp_path: Path) -> None:
    lines = ["question,answer", *(f"What is {n}?,It is {n}{'0 방울' if n % 1000 == 0 else ''}" for n in range(25_000))]
    found = sets.bring_in(csv(tmp_path / "many.csv", lines))
    last = data_rows.page(found, number=10**6)
    assert (last.number, last.pages, last.first, last.count) == (1_250, 1_250, 24_981, 25_000)
    assert [row["line"] for row in last.examples][-1] == 25_001
    hits = data_rows.page(found, "방울 IS", 2)
    assert (hits.count, hits.pages, hits.first) == (25, 2, 21) and hits.examples[0]["line"] == 20_002
    assert data_rows.page(found, "nothing like it").examples == []
    assert list(data_rows.spread(10, 4)) == [0, 2, 5, 7] and list(data_rows.spread(3, 4)) == [0, 1, 2]


def test_causes_have_their_buttons_and_decisions_can_be_taken_back(sets: Datasets, tmp_path: Path) -> None:
    found = sets.bring_in(csv(tmp_path / "rows.csv"))
    page = problem_words.causes(found)
    for code, action in (("duplicate", "skip"), ("empty-field", "fill"), ("other-answer", "skip-all"),
                         ("outer-spaces", "trim")):  # fmt: skip
        assert f'data-fix="{code}" data-action="{action}"' in page
    assert "5 kept + 1 skipped = 6 rows" in page
    fixed = problem_words.causes(sets.fix(found.id, "duplicate", "skip"))
    assert 'data-fix="duplicate" data-action=""' in fixed and 'data-fix="duplicate" data-action="skip"' not in fixed
    clean = sets.bring_in(csv(tmp_path / "clean.csv", ["question,answer", "a,1", "b,2"]))
    assert "No problems found" in problem_words.causes(clean)


def test_uneven_classes_are_said_and_even_ones_are_not() -> None:
    assert "has 12 times the rows of rare" in data_words.balance({"common": 12, "rare": 1})
    assert "times the rows" not in data_words.balance({"a": 5, "b": 4}) and data_words.balance({}) == ""


def test_a_histogram_says_where_rows_are_cut_and_how_many() -> None:
    drawn = token_words.histogram([[100, 36, 10, 64], [30, 0, 5, 64], [90, 26, 0, 64]], "causal_lm", 3)
    assert 'data-cut="2" data-limit="64"' in drawn and "cut at 64" in drawn
    assert "longer than 64 tokens and cut: 2." in drawn and "nothing to learn within that: 1." in drawn
    fits = token_words.histogram([[30, 0, 5, 512]], "causal_lm", 1)
    assert 'data-cut="0"' in fits and "none is cut" in fits and "dp-cut" not in fits
    sampled = token_words.histogram([[30, 0, 0, 512]], "classification", 9)
    assert "Of 1 rows, evenly chosen from 9" in sampled and "nothing to learn" not in sampled


def test_tokens_are_escaped_marked_and_counted() -> None:
    part = {"part": "", "tokens": 5, "learned": 1, "lost": 1, "limit": 4,
            "pieces": [["<b>", 0], ["\\n", 2], ["x", 1], ["", 8], [None, 7], ["y", 4]]}  # fmt: skip
    drawn = token_words.rows([{"line": 3, "error": "", "parts": [part]}], "causal_lm", "line")
    assert "&lt;b&gt;" in drawn and "<b>\\n" not in drawn
    assert '<span class="tk l">x</span>' in drawn and '<span class="tk x">y</span>' in drawn
    assert "7 more tokens" in drawn and "1 cut at 4" in drawn and 'data-lost="1"' in drawn


def test_the_endpoints_answer_plainly(studio: Studio, sets: Datasets, tmp_path: Path) -> None:
    ends = DataEndpoints(studio)
    found = sets.bring_in(csv(tmp_path / "rows.csv"))
    told = ends.dataset_problems(found.id)
    assert (told["kept"], told["skipped"], told["total"]) == (5, 1, 6)
    assert told["causes"]["duplicate"] == {"count": 1, "remedies": ["skip"]} and told["fixes"] == {}
    fixed = ends.fix_dataset(found.id, "duplicate", "skip")
    assert (fixed["kept"], fixed["skipped"], fixed["fixes"]) == (4, 2, {"duplicate": "skip"})
    assert [row["id"] for row in ends.list_datasets()["datasets"]] == [fixed["dataset"]]
    rows = ends.dataset_rows(fixed["dataset"], 1, "안녕")
    assert rows["found"] == 1 and rows["rows"][0]["line"] == 7
    sides = ends.dataset_sides(fixed["dataset"], 0.25)
    assert sides["train"] + sides["held"] == 4 and sides["held"] == 1 and sides["both"]["questions"] == 0
    assert ends.rename_dataset(fixed["dataset"], "new")["dataset"]["name"] == "new"
    assert ends.dataset_history(fixed["dataset"])["bytes"] > 0
    ends.delete_dataset(fixed["dataset"])
    assert ends.list_datasets()["datasets"] == [] and len(ends.list_datasets(True)["datasets"]) == 1
    ends.restore_dataset(fixed["dataset"])
    assert ends.empty_dataset_bin() == {"removed": 0, "kept": []}
    for wrong in (lambda: ends.dataset_rows(found.id, 0), lambda: ends.dataset_rows(found.id, 1, 3),  # type: ignore[arg-type]
                  lambda: ends.token_preview(found.id, task="captioning")):  # fmt: skip
        with pytest.raises(ConfigError):
            wrong()


def test_tokens_come_from_the_inference_process(studio: Studio, sets: Datasets, tmp_path: Path) -> None:
    ends = DataEndpoints(studio)
    found = sets.bring_in(csv(tmp_path / "rows.csv"))
    answer = ends.token_preview(found.id, base="tiny-llama", max_length=16, rows=2)
    assert answer["task"] == "causal_lm" and [row["line"] for row in answer["rows"]] == [2, 3]
    (part,) = answer["rows"][0]["parts"]
    assert "".join(text for text, _ in part["pieces"]).endswith("1<|end|>") and part["learned"] == 2
    lengths = ends.token_lengths(found.id, base="tiny-llama", max_length=8)
    assert lengths["rows"] == 5 and lengths["limit"] == 8 and lengths["cut"] >= 1
    asked = token_panel.Asked.of("causal_lm", "tiny-llama", 8, "answers")
    list(token_panel.lengths(studio, found, asked, token_panel.SAMPLED))
    assert token_panel.next_cut(found, asked, 0) > 0
