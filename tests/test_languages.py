"""Two languages: which one is spoken, that every text is there in both, and that a layout differs in nothing else."""

from __future__ import annotations

import contextvars
import json
import logging
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import english
import pytest
import texts
from gradio_client import Client
from studio_server import serving

from engine import data
from engine.paths import REPOSITORY
from studio import i18n
from studio.i18n import KOREAN, LANGUAGES, catalogue, language, preferred, reported, speaking, t, wanted
from studio.languages import mark, shape

NAMES = {"한국어", "언어"}
"""Of the language itself, which an English page says too."""
SAYING = "teach a model something small, and see what it changed"


@pytest.mark.parametrize(
    ("header", "chosen"),
    [
        ("ko-KR,ko;q=0.9,en-US;q=0.8,en;q=0.7", "ko"),
        ("en-US,en;q=0.9,ko;q=0.8", "en"),
        ("en;q=0.5, ko;q=0.9", "ko"),
        ("fr-FR,fr;q=0.9,KO;q=0.2", "ko"),
        ("fr,ko;q=0", "en"),
        ("fr", "en"),
        ("*", "en"),
        ("", "en"),
        ("ko;q=x,,;;q=", "ko"),
    ],
)
def test_the_browsers_first_language_of_ours_is_spoken(header: str, chosen: str) -> None:
    assert preferred(header) == chosen


def test_the_address_goes_before_the_cookie_and_the_cookie_before_the_browser() -> None:
    korean = {"accept-language": "ko"}
    assert wanted({}, {}, korean) == "ko"
    assert wanted({}, {"studio-language": "en"}, korean) == "en"
    assert wanted({"language": "ko"}, {"studio-language": "en"}, {}) == "ko"
    # What nobody speaks is as good as nothing.
    assert wanted({"language": "xx"}, {"studio-language": "<"}, korean) == "ko"


def test_a_callback_speaks_as_its_request_asks_whatever_is_spoken_around_it() -> None:
    import gradio as gr
    from fastapi import Request
    from gradio.context import LocalContext

    def asked(cookie: str) -> tuple[str, str]:
        headers = [(b"accept-language", b"en"), (b"cookie", cookie.encode())]
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
        LocalContext.request.set(gr.Request(Request(scope)))
        return language(), t(SAYING)

    with speaking(KOREAN):
        assert contextvars.copy_context().run(asked, "studio-language=en") == ("en", SAYING)
        assert language() == "ko"
    assert contextvars.copy_context().run(asked, "studio-language=ko") == ("ko", catalogue(KOREAN)[SAYING])
    assert language() == "en"


def test_what_a_component_asks_is_answered_in_the_language_that_is_spoken() -> None:
    from fastapi import Request
    from gradio.context import LocalContext

    def asked() -> str:
        # Gradio hands the plain request on there; its language has been read on the way in (`studio.languages`).
        LocalContext.request.set(Request({"type": "http"}))  # type: ignore[arg-type]
        return t(SAYING)

    with speaking(KOREAN):
        assert contextvars.copy_context().run(asked) == catalogue(KOREAN)[SAYING]


def test_names_are_filled_in_and_a_missing_text_is_said_in_english_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(i18n, "catalogue", lambda chosen: {"{n} rows of {name}": "{name}의 {n}행"})
    assert t("{n} rows of {name}", n=3, name="{x}") == "3 rows of {x}"
    with speaking(KOREAN), caplog.at_level(logging.WARNING):
        assert t("{n} rows of {name}", n=3, name="{x}") == "{x}의 3행"
        for _ in range(2):
            assert t("{n} not there at all", n=3) == "3 not there at all"
        assert t("") == ""
    assert len([record for record in caplog.records if "not there at all" in record.getMessage()]) == 1


def test_every_text_is_there_in_every_other_language() -> None:
    needed = texts.wanted()
    for code in LANGUAGES.keys() - {"en"}:
        there = texts.translated(code)
        missing = [f"  {where}: {text!r}" for text, where in needed.items() if text not in there]
        assert not missing, f"{len(missing)} texts are missing in studio/locales/{code}:\n" + "\n".join(missing)


def test_no_text_is_put_together_before_it_is_looked_up() -> None:
    faults = texts.sources().faults
    assert not faults, "t takes a literal, or a name of texts marked by N_:\n" + "\n".join(faults)


def test_scripts_say_nothing_that_cannot_be_translated() -> None:
    assert texts.untold("x.textContent = `${large.name} is too large`;  // words of a comment") == ["` is too large`"]
    assert texts.untold('say(\'Split the file\'); find("#data-file input"); studioText("so it is")') == [
        "'Split the file'"
    ]
    scripts = sorted((REPOSITORY / "studio" / "assets").rglob("*.js"))
    found = {path.name: texts.untold(path.read_text(encoding="utf-8")) for path in scripts}
    assert scripts and not any(found.values()), found


def test_translations_are_said_once_name_the_same_things_and_belong_to_a_text() -> None:
    known = texts.wanted()
    faults = []
    for code in LANGUAGES.keys() - {"en"}:
        for key, found in texts.translated(code).items():
            where = ", ".join(file for file, _ in found)
            if len({text for _, text in found}) > 1:
                faults.append(f"{where}: {key!r} has several translations")
            if key not in known:
                faults.append(f"{where}: no page says {key!r}")
            for file, text in found:
                if not isinstance(text, str) or not text.strip():
                    faults.append(f"{file}: {key!r} is translated by nothing")
                elif texts.fills(key) and set(texts.names(text)) != set(texts.names(key)):
                    faults.append(f"{file}: {key!r} and {text!r} name different things")
    assert not faults, "\n".join(faults)


def test_what_the_studios_own_errors_say_is_there_in_every_other_language() -> None:
    spoken = texts.spoken()
    for code in LANGUAGES.keys() - {"en"}:
        told = texts.reports(code)
        missing = [f"  {where}: {text!r}" for text, where in texts.faults().items() if text not in told]
        assert not missing, f"{len(missing)} texts are missing in {code}/reports.json:\n" + "\n".join(missing)
        stale = [key for key in told if key not in spoken]
        assert not stale, "no process says\n" + "\n".join(stale)
        uneven = [key for key, text in told.items() if sorted(set(texts.names(text))) != texts.names(key)]
        assert not uneven, "other gaps than the English text has:\n" + "\n".join(uneven)


def test_what_the_engine_says_to_whoever_sits_before_a_page_is_there_in_every_other_language() -> None:
    # What is nothing but gaps says what fills them.
    said = {text: where for text, where in texts.faults("engine").items() if re.search(r"\w", example(text, ""))}
    for code in LANGUAGES.keys() - {"en"}:
        with speaking(code):
            unknown = {text: where for text, where in said.items() if reported(example(text)) == example(text)}
        left = {
            text for text, where in unknown.items() if where.split(":")[0] in english.MODULES or text in english.TEXTS
        }
        missing = [f"  {where}: {text!r}" for text, where in unknown.items() if text not in left]
        assert not missing, f"{len(missing)} texts are missing in {code}/reports.json:\n" + "\n".join(missing)
        modules = {where.split(":")[0] for where in unknown.values()}
        assert modules >= english.MODULES, f"all of these is translated by now: {english.MODULES - modules}"
        assert unknown.keys() >= english.TEXTS, f"translated or gone: {english.TEXTS - unknown.keys()}"


def example(text: str, filling: str = r"X\1x") -> str:
    """A report as a process may say it, its gaps filled in."""
    return re.sub(r"\{(\d+)\}", filling, text)


def test_a_report_of_several_parts_is_translated_part_by_part() -> None:
    with speaking(KOREAN):
        both = reported("5 cells, and the header has 3. Those beyond it were cut.")
        assert both == "칸이 5개인데, 머리글은 3개입니다. 넘치는 칸은 잘랐습니다."
        assert reported("The cell 'a; b' is empty.") == "'a; b' 칸: 비어 있습니다."
        assert reported("Line 3 asks the same with another answer; both are kept.").startswith("줄 3이(가) 같은")
        # One part that nobody knows: nothing is translated, rather than half of it.
        assert reported("Those beyond it were cut. But who knows?") == "Those beyond it were cut. But who knows?"
        assert reported(f"By their names, {data.FORMATS['text'].about}: a.") == "이름으로 알아봤습니다(이어 쓸 글): a."


def test_a_report_is_known_by_its_shape_and_its_causes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(i18n, "_FOLDER", tmp_path)
    i18n._reports.cache_clear()
    told = {
        "Wait.": "기다리세요.",
        "No {0} in {1}.": "{1}에 {0} 없음.",
        "{0} failed: {1}": "{0} 실패: {1}",
        "{0}.": "?",
    }
    (tmp_path / "ko").mkdir()
    (tmp_path / "ko" / "reports.json").write_text(json.dumps(told), encoding="utf-8")
    try:
        with speaking(KOREAN):
            assert reported("Wait.") == "기다리세요."
            assert reported("No a (b) in c.") == "c에 a (b) 없음."
            assert reported("Work failed: No x in y.") == "Work 실패: y에 x 없음."
            assert reported("Wait.\n- No a in b.\n- other") == "기다리세요.\n- b에 a 없음.\n- other"
            assert reported("Something else") == "Something else" and reported("") == ""
        assert reported("Wait.") == "Wait."
    finally:
        i18n._reports.cache_clear()


def test_the_reader_of_sources_finds_what_it_must(tmp_path: Path) -> None:
    """The check itself: what it takes for a text, and what it refuses."""
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "page.py").write_text(
        'A = {"x": N_("of a table")}\nB = {"x": "no"}\nt(A["x"])\nt(B["x"])\nt("joined " "up", n=1)\n'
        't("one" if n else "many")\nt(f"built {n}")\nt("a" + b)\nt(item.title)\nt(name())\nt(mod.A)\n'
    )
    found = texts.sources(folder)
    assert set(found.keys) == {"of a table", "joined up", "one", "many"}
    assert [fault.split(":")[1] for fault in found.faults] == ["4", "7", "8", "10"]
    assert texts.names("{b} of {a}") == ["a", "b"] and not texts.fills("translate {source} to {")


def test_only_what_is_drawn_differs_between_the_languages() -> None:
    from gradio.context import Context

    from studio.context import Studio
    from studio.shell import create_app

    studio = Studio.open()
    pages = create_app(studio)
    try:
        english = pages.config
        with speaking(KOREAN):
            korean = pages.config
        both = english, korean
        assert shape(english) == shape(korean) and Context.id > max(item["id"] for item in english["components"])
        tabs, others = ({c["props"]["label"] for c in part["components"] if c["type"] == "tabitem"} for part in both)
        assert {"Adapters", "Scores"} <= tabs and {"어댑터", "점수"} <= others and not tabs & others
        assert set(re.findall("[가-힣]+", json.dumps(english["components"], ensure_ascii=False, default=str))) <= NAMES
        # The public endpoints are described in English, whoever asked first.
        with speaking(KOREAN):
            described = pages.get_api_info()
        assert described == pages.get_api_info()
        # As `launch` does: the new configuration is the base's, the other layouts stay.
        pages.config = {**english, "app_id": 7}
        with speaking(KOREAN):
            assert pages.config["app_id"] == 7 and pages.config["components"] is korean["components"]
    finally:
        studio.close()


def test_a_page_names_its_language_and_no_text_of_it_ends_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    from studio import languages

    monkeypatch.setattr(languages, "script_texts", lambda: ["Too large", "gone"])
    monkeypatch.setattr(languages, "catalogue", lambda chosen: {"Too large": "</script><b>"} if chosen == "ko" else {})
    page = mark(b'<!doctype html><html\n\tlang="en"\n><head><p lang="en">', "ko").decode()
    assert '<html\n\tlang="ko"' in page and '<p lang="en">' in page
    assert page.count("</script>") == 1 and '{"Too large": "\\u003c/script>' in page


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("home")) as running:
        yield running.address


def fetched(address: str, **headers: str) -> tuple[str, Any]:
    """A page's text and its headers."""
    request = urllib.request.Request(address, headers={name.replace("_", "-"): text for name, text in headers.items()})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode(), answer.headers


def test_the_server_hands_each_browser_its_own_page(server: str) -> None:
    english, headers = fetched(server)
    korean, _ = fetched(server, accept_language="ko-KR,ko;q=0.9,en;q=0.8")
    assert SAYING in english and catalogue(KOREAN)[SAYING] not in english and '\tlang="en"' in english
    assert catalogue(KOREAN)[SAYING] in korean and SAYING not in korean and '\tlang="ko"' in korean
    assert "Accept-Language" in headers["vary"] and "Cookie" in headers["vary"]
    assert catalogue(KOREAN)[SAYING] in fetched(f"{server}/?language=ko")[0]
    assert catalogue(KOREAN)[SAYING] in fetched(server, cookie="studio-language=ko")[0]
    assert SAYING in fetched(server, accept_language="ko", cookie="studio-language=en")[0]
    # The same by Gradio's other way, and in between somebody in English.
    assert catalogue(KOREAN)[SAYING] in fetched(f"{server}/config", accept_language="ko")[0]
    assert SAYING in fetched(f"{server}/config")[0]


def test_a_program_is_answered_in_english(server: str) -> None:
    fetched(server, accept_language="ko")
    client = Client(server, verbose=False)
    described = client.view_api(return_format="dict", print_info=False)
    assert not re.search("[가-힣]", json.dumps(described, ensure_ascii=False))
    answer = client.predict("run-00000000", 0, api_name="/run_status")
    assert not re.search("[가-힣]", json.dumps(answer, ensure_ascii=False))


def test_the_documentation_says_how_a_language_is_added() -> None:
    page = (REPOSITORY / "docs" / "languages.md").read_text(encoding="utf-8")
    assert "studio/locales" in page and all(name in page for name in LANGUAGES.values())
