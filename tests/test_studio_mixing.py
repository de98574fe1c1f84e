"""Mixing, saving, exporting and resizing with the real toys: what the processes answer, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_adapters import finished_run, lora, write

from engine import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig
from engine.adapters import ADAPTERS
from engine.combinations import COMBINATIONS, LIVE
from engine.errors import ConfigError, EngineError
from studio import adapter_files, adapting, export_words, exporting, mixing, presets, states
from studio.adapter_api import AdapterEndpoints
from studio.context import Studio
from studio.inference import InferenceError
from studio.store import StateError

HOW = {"seed": 1, "temperature": 0.0, "max_new_tokens": 12}
PROMPT = "What colour is grass?"
UNET = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_v"]}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """One home with adapters of the tiny Llama: loras of ranks 4, 4 and 6, an IA3, virtual tokens."""
    with contextlib.closing(Studio.open(tmp_path_factory.mktemp("home"))) as studio:
        finished_run(studio, "one", lora(), 1)
        finished_run(studio, "two", lora(), 2)
        finished_run(studio, "three", lora(r=6, target_modules=["q_proj", "down_proj"]), 3)
        finished_run(studio, "ia3", IA3Config(target_modules=["k_proj"], feedforward_modules=[]), 4)
        finished_run(studio, "tokens", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), 5)
        finished_run(studio, "style", LoraConfig(**UNET), 6, "tiny-sd")
        finished_run(studio, "loha", LoHaConfig(r=2, target_modules=["to_q"]), 7, "tiny-sd")
        yield studio
        studio.works.stop()


def adapter(studio: Studio, name: str) -> str:
    return str(next(row["id"] for row in studio.library.rows() if row["name"] == name))


def parts(studio: Studio, **weights: float) -> list[tuple[str, float]]:
    return [(adapter(studio, name), weight) for name, weight in weights.items()]


def heard(studio: Studio, how: str = LIVE, known: Any = None, **weights: float) -> str:
    """The mix's words."""
    mixture = mixing.check(studio, parts(studio, **weights), how, None, 0.5)
    *_, last = mixing.answer(studio, mixture, PROMPT, HOW, base_answer=known)
    assert last.finished
    return last.columns[1].text


def alike(one: str, other: str) -> bool:
    """The same answer but for rounding, which in bf16 may change a late word; the tensors have tests of their own."""
    return bool(one) and one.split()[:4] == other.split()[:4]


def ended(studio: Studio, work: str, seconds: float = 180) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while studio.works.present() is not None:
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
    return studio.works.get(work)


def done(studio: Studio, work: str) -> dict[str, Any]:
    row = ended(studio, work)
    assert row["state"] == states.DONE, (row["error"], studio.works.log_tail(work))
    return dict(row["result"])


def test_every_type_has_words_and_the_flags_are_the_engines() -> None:
    assert set(mixing.MEANINGS) == set(mixing.TITLES) == {LIVE, *COMBINATIONS}
    assert {name for name, spec in ADAPTERS.items() if not spec.mergeable} == set(mixing.PROMPTS)
    assert set(presets.methods()) >= set(mixing.PROMPTS)


def test_moving_a_weight_changes_the_answer_and_reloads_nothing(studio: Studio) -> None:
    first = heard(studio, one=1.0, two=0.0)
    child = studio.inference._child
    assert child is not None
    moved = heard(studio, one=-1.0, two=1.0)
    assert moved != first and heard(studio, one=1.0, two=0.0) == first
    assert studio.inference._child is child
    # With all weights 0 the base answers.
    mixture = mixing.check(studio, parts(studio, one=0.0, two=0.0))
    *_, last = mixing.answer(studio, mixture, PROMPT, HOW)
    assert last.columns[0].text == last.columns[1].text


def test_cat_is_heard_as_live_and_pruning_is_not(studio: Studio) -> None:
    live = heard(studio, one=1.4, two=0.7)
    assert alike(heard(studio, "cat", one=1.4, two=0.7), live)
    # Greedy words hide small changes: of the types that prune, some must be heard.
    assert {heard(studio, how, one=1.4, two=0.7) for how in ("ties", "dare_ties", "magnitude_prune")} - {live}
    with pytest.raises(InferenceError, match="equal ranks"):
        heard(studio, "linear", one=1.0, three=1.0)
    assert heard(studio, one=1.4, two=0.7) == live


def test_what_was_kept_of_the_base_is_not_asked_again(studio: Studio) -> None:
    known = mixing.Column(None, "base", "", "what it said", True)
    mixture = mixing.check(studio, parts(studio, one=1.0))
    *_, last = mixing.answer(studio, mixture, PROMPT, HOW, base_answer=known)
    assert last.columns[0].text == "what it said" and last.columns[1].text


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "No adapter"),
        ({"one": 2.5}, "-1 to 2"),
        ({"one": True}, "-1 to 2"),
        ({"one": float("nan")}, "-1 to 2"),
        ({"one": 1.0, "style": 1.0}, "belongs to"),
        ({"tokens": 1.0}, "virtual tokens"),
        ({"one": 1.0, "two": 1.0, "three": 1.0, "ia3": 1.0, "tokens": 1.0}, "at most 4"),
    ],
)
def test_what_cannot_be_mixed_says_why(studio: Studio, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mixing.check(studio, parts(studio, **asked))


def test_a_mix_is_saved_as_an_adapter_that_answers_as_it_was_heard(studio: Studio) -> None:
    live = heard(studio, one=1.5, three=-0.8)
    mixture = mixing.check(studio, parts(studio, one=1.5, three=-0.8))
    result = done(studio, mixing.kept(studio, mixture, "a calm sea"))
    row = studio.library.get(result["adapter"])
    assert (row["name"], row["origin"], row["rank"], row["base"]) == ("a calm sea", "mixed", 10, "tiny-llama")
    assert result["error"] < 1e-5 and row["details"]["parts"] == [["one", 1.5], ["three", -0.8]]
    again = mixing.check(studio, [(row["id"], 1.0)])
    *_, last = mixing.answer(studio, again, PROMPT, HOW)
    assert alike(last.columns[1].text, live)
    assert row["colour"] not in ("", studio.library.get(adapter(studio, "loha"))["colour"])


def test_one_work_at_a_time_and_stop_leaves_nothing(studio: Studio) -> None:
    mixture = mixing.check(studio, parts(studio, one=1.0))
    before = studio.library.count()
    work = mixing.kept(studio, mixture, "stopped")
    with pytest.raises(StateError, match="under way"):
        mixing.kept(studio, mixture, "second")
    studio.works.stop()
    assert ended(studio, work)["state"] == states.STOPPED and studio.library.count() == before
    deadline = time.monotonic() + 60
    while [path.name for path in studio.works.folder(work).iterdir()] != ["work.log"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_process_is_an_error_in_words(studio: Studio) -> None:
    work = mixing.kept(studio, mixing.check(studio, parts(studio, one=1.0)), "killed")
    deadline = time.monotonic() + 60
    while studio.works.get(work)["pid"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(studio.works.get(work)["pid"], signal.SIGKILL)
    row = ended(studio, work)
    assert row["state"] == states.FAILED and row["error"]["code"] == "lost" and "signal 9" in row["error"]["message"]


def test_an_adapter_goes_out_as_a_zip_and_comes_in_as_itself(studio: Studio) -> None:
    work = exporting.export(studio, adapter(studio, "one"), "peft")
    assert done(studio, work)["bytes"] > 0
    place = exporting.exported(studio, work)
    assert set(zipfile.ZipFile(place).namelist()) == {adapter_files.CONFIG, adapter_files.WEIGHTS, "README.md"}
    assert "An adapter for tiny-llama" in zipfile.ZipFile(place).read("README.md").decode()
    result = done(studio, adapting.bring_in(studio, [place], "again"))
    row, first = studio.library.get(result["adapter"]), studio.library.get(adapter(studio, "one"))
    same = ("base", "task", "method", "rank", "targets", "parameters")
    assert [row[key] for key in same] == [first[key] for key in same] and row["origin"] == "imported"
    assert heard(studio, again=1.0) == heard(studio, one=1.0)


def test_what_does_not_fit_its_base_is_refused_before_it_is_in_the_library(studio: Studio, tmp_path: Path) -> None:
    folder = write(tmp_path / "odd", lora(target_modules=["q_proj"]))
    config = folder / adapter_files.CONFIG
    files = [config, folder / adapter_files.WEIGHTS]
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))
    row = ended(studio, adapting.bring_in(studio, files, "odd"))
    assert row["state"] == states.FAILED and row["error"]["code"] == "checkpoint" and "shape" in row["error"]["message"]
    assert "odd" not in {it["name"] for it in studio.library.rows()}
    config.write_text(config.read_text().replace("tiny-llama", "/etc/secret"))
    with pytest.raises(ConfigError, match="not known here"):
        adapting.bring_in(studio, files, "odd")
    with pytest.raises(ConfigError, match="Which base"):
        adapting.bring_in(studio, files, "odd", str(tmp_path))
    assert list((studio.home / "works").iterdir())


def test_a_style_goes_out_and_in_as_kohyas_file(studio: Studio) -> None:
    work = exporting.export(studio, adapter(studio, "style"), "kohya")
    done(studio, work)
    place = exporting.exported(studio, work)
    with pytest.raises(ConfigError, match="Which base"):
        adapting.bring_in(studio, [place])
    with pytest.raises(ConfigError, match="no such base"):
        adapting.bring_in(studio, [place], "x", "tiny-llama")
    row = studio.library.get(done(studio, adapting.bring_in(studio, [place], "style again", "tiny-sd"))["adapter"])
    first = studio.library.get(adapter(studio, "style"))
    assert (row["task"], row["rank"], row["parameters"]) == ("text_to_image", 4, first["parameters"])
    assert sorted((studio.library.folder(row)).iterdir())[0].name == adapter_files.CONFIG


def test_two_styles_are_drawn_together(studio: Studio) -> None:
    mixture = mixing.check(studio, parts(studio, style=1.0, loha=0.5))
    *_, last = mixing.answer(studio, mixture, "a red apple", {**HOW, "steps": 2, "guidance": 2.0})
    drawn = [Path(column.picture).read_bytes() for column in last.columns]
    assert all(drawn) and drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("name", "form", "words"),
    [
        ("one", "kohya", "Stable Diffusion"),
        ("tokens", "merged", "no weight"),
        ("tokens", "gguf", "no weight"),
        ("loha", "diffusers", "LoHa"),
        ("ia3", "gguf-adapter", "IA3"),
        ("style", "gguf", "Llama family"),
    ],
)
def test_forms_that_have_no_place_for_an_adapter_say_so_before_anything_starts(
    studio: Studio, name: str, form: str, words: str
) -> None:
    assert words in export_words.export_refusal(studio.library.get(adapter(studio, name)), form)
    with pytest.raises(ConfigError, match=words):
        exporting.export(studio, adapter(studio, name), form)
    with pytest.raises(ConfigError, match="There is no form"):
        exporting.export(studio, adapter(studio, name), "../x")


def test_a_merged_model_answers_like_the_adapter_on_its_base(studio: Studio) -> None:
    work = exporting.export(studio, adapter(studio, "one"), "merged")
    result = done(studio, work)
    folder = studio.works.folder(work) / result["path"]
    with pytest.raises(StateError, match="folder"):
        exporting.exported(studio, work)
    wanted = heard(studio, one=1.0)
    pieces = studio.inference.generate(str(folder), {}, [{"role": "user", "content": PROMPT}], [None], HOW)
    said = "".join(piece["text"] for piece in pieces if piece["type"] == "piece")
    assert alike(said, wanted)
    assert adapting.known_base(studio, str(folder)) == str(folder.resolve())


def test_a_gguf_holds_the_adapter_in_the_weights_that_answer(studio: Studio) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work = exporting.export(studio, adapter(studio, "one"), "gguf", "f32")
    assert done(studio, work)["form"] == "gguf"
    place = exporting.exported(studio, work)
    assert place.name == "one-f32.gguf"
    merged = exporting.export(studio, adapter(studio, "one"), "merged")
    folder = studio.works.folder(merged) / done(studio, merged)["path"]
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        there = AutoModelForCausalLM.from_pretrained(place.parent, gguf_file=place.name, dtype=torch.float32)(ids)
        here = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids)
    # The folder's weights may be bf16, the file's are float32.
    assert (there.logits - here.logits).abs().max() < 0.3
    single = exporting.export(studio, adapter(studio, "one"), "gguf-adapter")
    done(studio, single)
    alone = exporting.exported(studio, single)
    assert alone.name == "one-lora.gguf" and alone.stat().st_size < place.stat().st_size / 10
    with pytest.raises(ConfigError, match="The precision is 'q2'"):
        exporting.export(studio, adapter(studio, "one"), "gguf", "q2")


def test_lowering_a_rank_costs_what_was_told_and_raising_it_nothing(studio: Studio) -> None:
    three = adapter(studio, "three")
    errors = adapting.rank_errors(studio, three)
    assert len(errors) == 6 and errors[-1] == 0 and errors == sorted(errors, reverse=True)
    result = done(studio, adapting.resize(studio, three, 2))
    row = studio.library.get(result["adapter"])
    assert (row["name"], row["rank"]) == ("three r2", 2) and result["error"] == pytest.approx(errors[1], rel=1e-3)
    wider = studio.library.get(done(studio, adapting.resize(studio, three, 12, "wide"))["adapter"])
    assert wider["rank"] == 12 and wider["details"]["error"] == 0
    assert alike(heard(studio, wide=1.0), heard(studio, three=1.0))
    for bad in (0, 6, 513, 2.5, True, None, "2"):
        with pytest.raises(ConfigError):
            adapting.resize(studio, three, bad)
    with pytest.raises(ConfigError, match="IA3"):
        adapting.resize(studio, adapter(studio, "ia3"), 2)


def test_the_endpoints_answer_plain_data_without_paths(studio: Studio) -> None:
    ends = AdapterEndpoints(studio)
    found = ends.list_adapters("one")["adapters"]
    assert str(studio.home) not in str(found) and found[-1]["method"] == "lora"
    one, two = adapter(studio, "one"), adapter(studio, "two")
    *_, last = ends.mix([[one, 0.5], [two, 0.5]], PROMPT, max_new_tokens=6)
    assert last["finished"] and last["mix"]["text"] and last["base"]["text"]
    mix = ends.save_mix("calm", [[one, 0.5], [two, 0.5]], "svd", 3)["mix"]
    assert ends.list_mixes()["mixes"][0]["settings"] == {"how": "svd", "rank": 3, "density": 0.5}
    assert ends.delete_mix(mix) == {"mix": mix}
    for bad in ([[one]], "one", [one], None, [[one, "loud"]], [["../x", 1.0]]):
        *_, last = ends.mix(bad, PROMPT)  # type: ignore[arg-type]
        assert last["error"]["code"] in ("config", "unknown-id")
    assert "error" in list(ends.mix([[one, 1.0]], "  "))[-1]
    with pytest.raises(EngineError):
        ends.adapter_work("../x")
