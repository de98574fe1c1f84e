"""The look: one calm theme, light and dark, from the fonts that the machine has. Nothing is fetched from elsewhere."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import gradio as gr
from gradio.themes.utils import colors, sizes

from engine.paths import REPOSITORY
from studio.store import PALETTE

_FOLDER = REPOSITORY / "studio" / "assets"

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans KR", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]

_PAGE = ".gradio-container.gradio-container .contain"
_SELECTORS = re.compile(r",\s*(?![^(]*\))")

ACCENT, ACCENT_DARK = "#1f5fa8", "#2a6fbe"


def theme() -> gr.themes.Base:
    """Gradio's theme with our colours, spacing and fonts."""
    return gr.themes.Base(
        primary_hue=colors.blue,
        neutral_hue=colors.slate,
        radius_size=sizes.radius_md,
        spacing_size=sizes.spacing_md,
        font=FONT,
        font_mono=MONO,
    ).set(
        body_background_fill="#f6f7f9",
        body_background_fill_dark="#14171c",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1c2027",
        block_border_color="#dfe3e8",
        block_border_color_dark="#333a44",
        block_border_width="0px",
        block_label_background_fill="#ffffff",
        block_label_background_fill_dark="#1c2027",
        input_background_fill="#ffffff",
        input_background_fill_dark="#14171c",
        color_accent=ACCENT,
        input_placeholder_color="#66707f",
        input_placeholder_color_dark="#8f99a8",
        input_border_width="1px",
        input_border_color="#b9c0ca",
        input_border_color_dark="#4a5361",
        button_primary_background_fill=ACCENT,
        button_primary_background_fill_dark=ACCENT_DARK,
        button_primary_background_fill_hover="#184c87",
        button_primary_background_fill_hover_dark="#245fa3",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="#e9edf2",
        button_secondary_background_fill_dark="#2a303a",
        button_secondary_text_color="#1d2430",
        button_secondary_text_color_dark="#e8ebf0",
        body_text_color="#1d2430",
        body_text_color_dark="#e8ebf0",
        body_text_color_subdued="#566070",
        body_text_color_subdued_dark="#a8b1bf",
        block_info_text_color="#566070",
        block_info_text_color_dark="#a8b1bf",
    )


@functools.cache
def css() -> str:
    """The studio's own style sheets (`assets/styles`), with a class for each colour that a slider may have."""
    sliders = "\n".join(f".mix-c{n} {{ --slider-color: {shade}; --c: {shade}; }}" for n, shade in enumerate(PALETTE))
    sheets = (path.read_text(encoding="utf-8") for path in sorted((_FOLDER / "styles").glob("*.css")))
    return "\n".join([*sheets, sliders, ""])


@functools.cache
def sheet() -> str:
    """`css` as the page needs it: each rule as it stands, and once more with the weight to prevail over Gradio's own.

    Gradio does the same with what `launch(css=)` is given, but in the browser, twice, before anything is drawn.
    """
    plain = re.sub(r"/\*.*?\*/", "", css(), flags=re.DOTALL)
    return "".join(f"{text}\n{_weighty(text)}\n" for text in _rules(plain))


def _rules(text: str) -> Iterator[str]:
    """The rules of a style sheet, one after another, those with rules in them whole."""
    depth = start = 0
    for at, sign in enumerate(text):
        if sign == "{":
            depth += 1
        elif sign == "}":
            depth -= 1
            if not depth:
                yield text[start : at + 1].strip()
                start = at + 1


def _weighty(rule: str) -> str:
    """A rule with the weight of two more classes; none for what has no selector."""
    head, _, body = rule.partition("{")
    if head.startswith("@media"):
        return f"{head}{{{''.join(map(_weighty, _rules(body[:-1])))}}}"
    if head.startswith("@"):
        return ""
    return f"{', '.join(map(_within, _SELECTORS.split(head.strip())))} {{{body}"


def _within(selector: str) -> str:
    dark = selector.startswith(".dark ")
    return f"{'.dark ' if dark else ''}{_PAGE} {selector.removeprefix('.dark ').strip()}"


def head() -> str:
    """What stands in the page's head: the frame's style, hover text on charts, the run and tab in the address."""
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    scripts = (path.read_text(encoding="utf-8") for path in sorted((_FOLDER / "scripts").glob("*.js")))
    return f"<style>{style}</style>" + "".join(f"<script>{script}</script>" for script in scripts)
