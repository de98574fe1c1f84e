"""Columns, grids and what is kept of them, with the real toys: who answers, in which order, and what the file says."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_adapters import finished_run, lora, write

from engine import LoraConfig
from engine.data import PictureError
from engine.errors import ConfigError, PromptError
from engine.generation import MOST_COLUMNS
from studio import grids, mixing, sharing, voices
from studio.answers import Answers, Column
from studio.compare_words import columns_html, marks_html
from studio.comparing import answer, answers_from, kept_picture
from studio.comparisons import ANSWERS, GRID, Comparisons
from studio.context import Studio
from studio.library import IMPORTED
from studio.store import PALETTE, StateError, Store, UnknownError

HOW = {"seed": 1, "temperature": 0.0, "max_new_tokens": 12}
DRAWN = {"seed": 1, "steps": 2, "guidance": 3.0}
PROMPT = "What colour is grass?"
LIVE = {"how": "live", "rank": None, "density": 0.5}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with contextlib.closing(Studio.open(tmp_path_factory.mktemp("home"))) as studio:
        finished_run(studio, "one", lora(), 1)
        finished_run(studio, "two", lora(), 2)
        friend = write(studio.home / "draft", lora(r=6), seed=3)
        studio.library.add(friend, "friend", IMPORTED, "tiny-llama", "causal_lm")
        unet = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"])
        finished_run(studio, "style", unet, 4, "tiny-sd")
        yield studio


def named(studio: Studio, name: str) -> str:
    return str(next(row["id"] for row in studio.library.rows() if row["name"] == name))


def asked(studio: Studio, keys: list[str], base: str = "tiny-llama", **how: Any) -> Any:
    *_, last = answer(studio, base, keys, PROMPT, {**HOW, **how})
    assert last.finished and last.kept
    return last


def alike(one: str, other: str) -> bool:
    """The same answer but for rounding, which in bf16 may change a late word."""
    return bool(one) and one.split()[:4] == other.split()[:4]


def test_runs_imported_adapters_and_mixes_of_every_type_stand_in_one_batch(studio: Studio) -> None:
    one, two, friend = (named(studio, name) for name in ("one", "two", "friend"))
    live = studio.library.save_mix("live", "tiny-llama", [(one, 0.8), (two, -0.5)], LIVE)
    ties = studio.library.save_mix("ties", "tiny-llama", [(one, 0.8), (two, 0.8)], {**LIVE, "how": "ties"})
    run = studio.library.get(one)["run_id"]
    state = asked(studio, [run, one, friend, f"mix-{live}", f"mix-{ties}", one])
    assert [column.title for column in state.columns] == ["base", "one", "one", "friend", "live", "ties"]
    assert [column.run for column in state.columns][:3] == [None, run, one]
    texts = [column.text for column in state.columns]
    assert texts[1] == texts[2] != texts[0] and all(texts)
    for place, (parts, how) in {4: ([(one, 0.8), (two, -0.5)], "live"), 5: ([(one, 0.8), (two, 0.8)], "ties")}.items():
        *_, heard = mixing.answer(studio, mixing.check(studio, parts, how, None, 0.5), PROMPT, HOW)
        assert alike(heard.columns[1].text, texts[place]), how
    assert not alike(texts[4], texts[0]) or not alike(texts[5], texts[0])
    colours = [column.colour for column in state.columns[3:]]
    assert len(set(colours)) == 3 and not set(colours[1:]) & set(PALETTE)
    # The same seed and, with others beside it or not, the same words.
    assert alike(asked(studio, [friend]).columns[1].text, texts[3])
    kept = Comparisons(studio.store, studio.home).get(state.kept)
    assert kept["results"][4]["mix"] == {"how": "live", "parts": [["one", 0.8], ["two", -0.5]]}
    assert [column.text for column in answers_from(kept).columns] == texts


def test_what_cannot_stand_in_a_column_is_said(studio: Studio) -> None:
    one, style = named(studio, "one"), named(studio, "style")
    assert voices.MOST + 1 == MOST_COLUMNS
    with pytest.raises(ConfigError, match="at most 7"):
        voices.voices(studio, "tiny-llama", [f"mix-{number}" for number in range(8)])
    with pytest.raises(StateError, match="belongs to the base tiny-sd"):
        voices.voices(studio, "tiny-llama", [style])
    for unknown in ("ad-00000000", "mix-99", "../adapter", "run-00000000"):
        with pytest.raises(UnknownError):
            voices.voices(studio, "tiny-llama", [unknown])
    with pytest.raises(PromptError):
        list(answer(studio, "tiny-llama", [], "  ", HOW))
    gone = studio.library.save_mix("gone", "tiny-llama", [(one, 1.0), ("ad-00000000", 1.0)], LIVE)
    with pytest.raises(StateError, match="1 of the adapters of gone"):
        voices.voices(studio, "tiny-llama", [f"mix-{gone}"])
    studio.library.bin(one)
    try:
        with pytest.raises(StateError, match="in the bin"):
            voices.voices(studio, "tiny-llama", [one])
        assert one not in dict(map(reversed, voices.choices(studio, "tiny-llama")))  # type: ignore[arg-type]
    finally:
        studio.library.restore(one)
    assert ("friend (imported)", named(studio, "friend")) in voices.choices(studio, "tiny-llama")


def test_a_run_that_was_trained_on_is_another_voice(studio: Studio) -> None:
    (_, before) = voices.voices(studio, "tiny-llama", [named(studio, "two")])
    config = studio.library.folder(studio.library.get(named(studio, "two"))) / "adapter_config.json"
    config.write_bytes(config.read_bytes())
    (_, after) = voices.voices(studio, "tiny-llama", [named(studio, "two")])
    assert before.key == after.key and before.version != after.version


def pixels(path: str) -> Any:
    return np.asarray(Image.open(path)).astype(int)


def test_a_grid_is_drawn_dearest_axis_last_and_kept_cell_by_cell(studio: Studio) -> None:
    style = named(studio, "style")
    plan, who = grids.planned(studio, "tiny-sd", [style], ["a cat", "a red car"], [0.0, 1.0], [1, 2], DRAWN)
    assert [(c.run, c.weight, c.prompt, c.seed) for c in plan.cells[:6]] == [
        (None, None, "a cat", 1),
        (None, None, "a cat", 2),
        (None, None, "a red car", 1),
        (None, None, "a red car", 2),
        (style, 0.0, "a cat", 1),
        (style, 0.0, "a cat", 2),
    ]
    assert len(plan.cells) == 12 and [cell.weight for cell in plan.cells[8:]] == [1.0] * 4
    seen = [drawing.drawn for drawing in grids.draw(studio, plan, who)]
    assert sorted(set(seen)) == list(range(13)) and plan.finished
    pictures = [pixels(cell.picture) for cell in plan.cells]
    # At weight 0 the base draws; at 1 the adapter does, as it does side by side.
    for place in range(4):
        assert np.abs(pictures[4 + place] - pictures[place]).max() <= 1
        assert np.abs(pictures[8 + place] - pictures[place]).max() > 8
    *_, side = answer(studio, "tiny-sd", [style], "a cat", DRAWN)
    assert np.abs(pixels(side.columns[1].picture) - pictures[8]).max() <= 1
    row = Comparisons(studio.store, studio.home).get(plan.kept)
    assert row["kind"] == GRID and len(row["results"]) == 12
    again = grids.drawing_from(row)
    assert [vars(cell) for cell in again.cells] == [vars(cell) for cell in plan.cells]
    assert again.find(None, 1.0, 2, "a cat") == 1 and again.find(style, 1.0, 2, "a cat") == 9


def test_what_a_grid_has_drawn_stays_when_it_is_left(studio: Studio) -> None:
    plan, who = grids.planned(studio, "tiny-sd", [named(studio, "style")], ["a cat"], [1.0], [3], DRAWN)
    drawing = grids.draw(studio, plan, who)
    while not plan.drawn:
        next(drawing)
    drawing.close()
    row = Comparisons(studio.store, studio.home).get(plan.kept)
    assert [it["run"] for it in row["results"]] == [None]
    assert "cmp-none" in sharing.page(row)


def test_axes_are_read_as_people_write_them_and_bounded() -> None:
    assert grids.weights_of("0.5, 1;-1  0.5") == [0.5, 1, -1]
    assert grids.seeds_of("3-5, 7") == [3, 4, 5, 7]
    assert grids.prompts_of(" a cat \n\na dog\na cat") == ["a cat", "a dog"]
    for read, text in (
        (grids.weights_of, "2.5"),
        (grids.weights_of, "much"),
        (grids.weights_of, ""),
        (grids.weights_of, "nan"),
        (grids.seeds_of, "1.5"),
        (grids.seeds_of, "-1"),
        (grids.seeds_of, "0-1000000"),
        (grids.prompts_of, " \n"),
        (grids.prompts_of, "\n".join("abcdefghi")),
    ):
        with pytest.raises(ConfigError):
            read(text)


def test_a_grid_is_refused_where_nothing_is_drawn_or_too_much(studio: Studio) -> None:
    with pytest.raises(ConfigError, match="draws no pictures"):
        grids.planned(studio, "tiny-llama", [], ["a"], [1.0], [0], DRAWN)
    with pytest.raises(ConfigError, match="would have 156"):
        grids.planned(studio, "tiny-sd", [named(studio, "style")], ["a"], list(range(12)), list(range(12)), DRAWN)


def test_the_bin_gives_back_and_emptying_it_spares_pictures_that_others_show(tmp_path: Path) -> None:
    with contextlib.closing(Studio.open(tmp_path)) as studio:
        comparisons = Comparisons(studio.store, tmp_path)
        (tmp_path / "pictures").mkdir()
        mine, shared, outside = tmp_path / "pictures" / "a.png", tmp_path / "pictures" / "b.png", tmp_path / "c.png"
        for path in (mine, shared, outside):
            path.write_bytes(b"x")
        columns = [{"picture": str(path)} for path in (mine, shared, outside)]
        first = comparisons.add(ANSWERS, "b", "p", {}, columns)
        second = comparisons.add(ANSWERS, "b", "p", {}, columns[1:2])
        comparisons.bin(first)
        assert [row["id"] for row in comparisons.rows()] == [second] and comparisons.count(deleted=True) == 1
        comparisons.restore(first)
        assert comparisons.count() == 2 and comparisons.empty_bin() == 0 and mine.exists()
        comparisons.bin(first)
        comparisons.shared(first).mkdir(parents=True)
        assert comparisons.empty_bin() == 1 and not comparisons.shared(first).exists()
        assert not mine.exists() and shared.exists() and outside.exists()
        for wrong in (first, None, True, "1", 2.0**60):
            with pytest.raises(UnknownError):
                comparisons.get(wrong)


def test_a_picture_that_was_brought_in_is_copied_once_by_its_content(tmp_path: Path) -> None:
    upload = tmp_path / "upload.png"
    Image.new("RGB", (8, 8), "red").save(upload)
    place = kept_picture(tmp_path / "home", str(upload))
    assert (
        place == kept_picture(tmp_path / "home", str(upload)) and Path(place).parent == tmp_path / "home" / "pictures"
    )
    assert Path(place).read_bytes() == upload.read_bytes()
    upload.write_bytes(b"no picture")
    with pytest.raises(PictureError):
        kept_picture(tmp_path / "home", str(upload))


def test_old_pictures_that_nothing_shows_go(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept, folder = Comparisons(store, tmp_path), tmp_path / "pictures"
    assert kept.forget_pictures() == 0
    folder.mkdir()
    for name in ("shown", "asked", "voted", "lost", "new"):
        (folder / f"{name}.png").write_bytes(b"x")
        if name != "new":
            os.utime(folder / f"{name}.png", (1.0, 1.0))
    kept.add("answers", "tiny-sd", "x", {}, [{"picture": str(folder / "shown.png")}], str(folder / "asked.png"))
    store.db.execute(
        "INSERT INTO votes (id, base, prompt, picture, settings, left_version, right_version, sides, created, owner)"
        " VALUES ('pair', 'tiny-sd', 'x', '', '{}', '', '', ?, ?, 'somebody')",
        [json.dumps([{"picture": "/moved/pictures/voted.png"}]), 1.0],
    )
    assert kept.forget_pictures() == 1
    assert {path.stem for path in folder.iterdir()} == {"shown", "asked", "voted", "new"}
    store.close()


def test_a_caption_is_kept_under_its_picture(studio: Studio, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "yellow").save(tmp_path / "sun.png")
    *_, state = answer(studio, "tiny-blip", [], "", {**HOW, "beams": 1}, str(tmp_path / "sun.png"))
    row = Comparisons(studio.store, studio.home).get(state.kept)
    (tmp_path / "sun.png").unlink()
    assert state.columns[0].text and row["prompt"] == "" and Path(row["picture"]).is_file()
    page = sharing.page(row)
    assert page.index("<img") < page.index(state.columns[0].text) and "A picture described" in page
    with pytest.raises(PromptError, match="no picture"):
        list(answer(studio, "tiny-blip", [], "a sun", HOW))


HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x' {0} ${y} `z` &lt; javascript:1"


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    for tag, attributes in tags.found:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form", "svg"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        assert "href" not in attributes
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/"), attributes
    return tags


@pytest.mark.parametrize("kind", [ANSWERS, GRID])
def test_a_shared_file_holds_no_markup_from_outside_and_asks_for_nothing(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "p.png")
    column = {"run": HOSTILE, "title": HOSTILE, "colour": HOSTILE, "version": HOSTILE}
    mix = {"how": HOSTILE, "parts": [[HOSTILE, 0.5]]}
    base = {"run": None, "title": "base", "colour": "#888888", "version": "base"}
    if kind == GRID:
        cell = {"weight": 1.0, "seed": 3, "prompt": HOSTILE, "picture": str(tmp_path / "p.png"), "seconds": 1.0}
        who = [{**base}, {**column, "mix": mix}]
        settings = {"steps": 3, "guidance": 4.0, "prompts": [HOSTILE], "seeds": [3], "weights": [1.0], "columns": who}
        cells = [{**cell, **{key: it[key] for key in ("run", "title", "colour")}} for it in who]
        results: list[dict[str, Any]] = [{**cells[0], "weight": None}, cells[1]]
    else:
        settings = {"seed": 3, "temperature": 0.3, "max_new_tokens": 80, "steps": 20, "guidance": 4.0}
        results = [
            {**base, "text": "바다는 넓다 " + HOSTILE},
            {**column, "mix": mix, "text": f"바다는 깊다 {HOSTILE} {HOSTILE}"},
        ]
    with contextlib.closing(Studio.open(tmp_path / "home")) as studio:
        comparisons = Comparisons(studio.store, studio.home)
        row = comparisons.get(comparisons.add(kind, "/home/me/" + HOSTILE, HOSTILE, settings, results))
        page = sharing.page(row)
        tags = read(page)
        place = sharing.written(comparisons.shared(row["id"]), row)
        assert place.read_text(encoding="utf-8") == page and place.parent.parent == studio.home / "shared"
    assert (
        "<script" not in page and "default-src 'none'" in page and "/home/me" not in page and str(tmp_path) not in page
    )
    assert tags.text.count("alert(1)") >= 3
    style = next(index for index, (tag, _) in enumerate(tags.found) if tag == "style")
    assert page.count("</style>") == 1 and style
    if kind == GRID:
        assert sum(tag == "img" for tag, _ in tags.found) == 4
        assert "a picture" not in tags.text
    else:
        assert "<ins" in page and "깊다" in page and 'lang="en"' in page


def test_marks_and_columns_are_safe_too() -> None:
    read(marks_html(HOSTILE, HOSTILE + " new " + HOSTILE[::-1]))
    state = Answers([Column(None, "base", "#888", HOSTILE, True), Column("x", HOSTILE, HOSTILE, "a " + HOSTILE, True)])
    read(columns_html(state, marked=True))
