"""The first view inside the HTML: when it is there, what it says, and what the page says of the machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from studio import first_page, machine, theme
from studio.guide import GOALS
from studio.page import TAB_IDS
from studio.samples import SAMPLES

HTML = b'<html><head><title>x</title></head><body style="a"><gradio-app control></gradio-app></body></html>'


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("", True),
        ("tab=start", True),
        ("language=ko", True),
        ("tab=train", False),
        ("run=run-01234567", False),
        ("guide=chat.data.sample.tiny-llama.sample", False),
        ("view=api", False),
    ],
)
def test_only_the_first_page_begins_with_its_first_view(query: str, first: bool) -> None:
    assert first_page.is_first(query) is first


def test_the_first_view_has_every_button_of_start_without_their_ids() -> None:
    page = first_page.filled(HTML, True).decode()
    for goal in GOALS:
        assert page.count(f'data-goal="{goal}"') == 1
    for sample in SAMPLES:
        assert page.count(f'data-sample="{sample}"') == 1 and f'id="start-{sample}"' not in page
    for tab in TAB_IDS:
        assert f'data-tab="{tab}"' in page
    assert (
        page.index("window.gradio_config") < page.index("</head>") < page.index("first-page") < page.index("<gradio-")
    )


def test_other_pages_have_the_script_alone_and_a_login_nothing_of_ours() -> None:
    assert b"first-page" not in first_page.filled(HTML, False) and b"gradio_config" in first_page.filled(HTML, False)
    asked = HTML.replace(b"<title>", b'<script>window.gradio_config = {"auth_required":true}</script><title>')
    assert b"first-page" not in first_page.filled(asked, True)


def test_the_machine_is_seen_without_torch_and_its_cards_are_asked_for_once(tmp_path: Path) -> None:
    assert machine.look(tmp_path).cards == ()
    said = machine.words(machine.Machine(2, 24_000_000_000))
    assert "2 CPU cores, 24.0 GB of memory, no graphics card" in said and "What would help" in said
    assert "Memory is short" in machine.words(machine.Machine(1, 4_000_000_000))

    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    information = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    information.write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n", encoding="utf-8")
    found = machine.look(tmp_path)
    assert [card.name for card in found.cards] == ["NVIDIA H100 80GB HBM3"]
    assert "NVIDIA H100 80GB HBM3" in machine.words(found) and "no graphics card" not in machine.words(found)

    answer = '{"gpus": [{"name": "NVIDIA H100 80GB HBM3", "memory": 84987740160}]}'
    waiting = found.ask((sys.executable, "-c", f"print({answer!r})"))
    assert waiting is not None and found.ask() is waiting
    waiting.join(60)
    assert found.cards == (machine.Card("NVIDIA H100 80GB HBM3", 84_987_740_160),)
    assert "(85.0 GB)" in machine.words(found) and "28 billion" in machine.words(found)


def test_without_a_card_no_process_is_asked_and_a_failed_one_changes_nothing() -> None:
    assert machine.Machine(2, 1).ask(("no-such-program",)) is None
    card = machine.Card("one")
    found = machine.Machine(2, 1, (card,))
    waiting = found.ask((sys.executable, "-c", "raise SystemExit(1)"))
    assert waiting is not None
    waiting.join(60)
    assert found.cards == (card,)


def test_each_rule_stands_plain_and_with_the_weight_to_prevail(monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = """
    /* a note { with a brace */
    .a, .b:is(.c, .d) > p { color: red; }
    .dark .a { color: blue; }
    @keyframes turn { from { left: 0; } to { left: 1px; } }
    @media (max-width: 640px) { .a { top: 0; } .b { top: 1px; } }
    """
    theme.sheet.cache_clear()
    monkeypatch.setattr(theme, "css", lambda: sheet)
    made = " ".join(theme.sheet().split())
    monkeypatch.undo()
    theme.sheet.cache_clear()
    weight = ".gradio-container.gradio-container .contain"
    assert made == (
        ".a, .b:is(.c, .d) > p { color: red; } "
        f"{weight} .a, {weight} .b:is(.c, .d) > p {{ color: red; }} "
        f".dark .a {{ color: blue; }} .dark {weight} .a {{ color: blue; }} "
        "@keyframes turn { from { left: 0; } to { left: 1px; } } "
        "@media (max-width: 640px) { .a { top: 0; } .b { top: 1px; } } "
        f"@media (max-width: 640px) {{{weight} .a {{ top: 0; }}{weight} .b {{ top: 1px; }}}}"
    )
    assert theme.sheet().count("{") == theme.sheet().count("}") > 2 * theme.css().count("{") * 0.9
