"""A comparison as one HTML file: pictures inside, no scripts, nothing fetched, light or dark as the reader has it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.paths import REPOSITORY
from studio import compare_words as words
from studio.comparing import answers_from
from studio.comparisons import GRID
from studio.grids import drawing_from
from studio.i18n import language, t
from studio.markup import dot, esc, number

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = REPOSITORY / "studio" / "assets" / "share.css"


def page(row: Mapping[str, Any]) -> str:
    """The whole file for a comparison of `Comparisons.get`.

    Every text from outside is escaped, and the file forbids the browser scripts and requests all the same.
    """
    title = words.name_of(row)
    body = _grid(row) if row["kind"] == GRID else _answers(row)
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(row["created"]))
    return (
        f'<!doctype html>\n<html lang="{language()}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{esc(title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{esc(t('A comparison'))}</h1>\n{body}\n<footer>{esc(t('Made with Adapter Studio'))}, {made}</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _answers(row: Mapping[str, Any]) -> str:
    state = answers_from(row)
    asked = words.asked_html(row["prompt"], row["picture"])
    pictured = any(column.picture for column in state.columns)
    toggle = (
        ""
        if pictured
        else f'<label class="marks"><input type="checkbox" checked> {esc(t("Mark differences"))}</label>'
        f"{words.legend_html()}"
    )
    columns = "".join(words.column_html(column, state, marked=True) for column in state.columns)
    return f'{asked}\n{toggle}<div class="st-columns">{columns}</div>\n{_settings(row)}'


def _grid(row: Mapping[str, Any]) -> str:
    drawing = drawing_from(row)
    large = "".join(words.cell_html(drawing, place) for place, cell in enumerate(drawing.cells) if cell.picture)
    return (
        f"{words.grid_html(drawing, buttons=False)}\n{_settings(row)}\n<details><summary>"
        f"{esc(t('Every picture with its settings'))}</summary>{large}</details>"
    )


def _settings(row: Mapping[str, Any]) -> str:
    """Base, who answered as what, and how it was sampled."""
    settings = row["settings"]
    who = settings["columns"] if row["kind"] == GRID else row["results"]
    names = {
        "seed": t("Seed"),
        "temperature": t("Temperature"),
        "max_new_tokens": t("Most tokens"),
        "steps": t("Steps"),
        "guidance": t("Guidance"),
    }
    drawn = row["kind"] == GRID or any(it.get("picture") for it in who)
    skipped = {"temperature", "max_new_tokens"} if drawn else {"steps", "guidance"}
    facts = [(t("Base"), esc(words.base_name(str(row["base"]))))]
    facts += [
        (name, esc(_value(settings[key]))) for key, name in names.items() if key in settings and key not in skipped
    ]
    for it in who:
        facts.append((f"{dot(it['colour'])}{esc(it['title'])}", esc(_described(it))))
    rows = "".join(f"<tr><th scope='row'>{name}</th><td>{value}</td></tr>" for name, value in facts)
    return f'<h2>{esc(t("Settings"))}</h2><table class="settings"><tbody>{rows}</tbody></table>'


def _value(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _described(column: Mapping[str, Any]) -> str:
    mix = column.get("mix")
    if not column.get("run"):
        return t("the base without adapters")
    if not mix:
        return t("adapter {version}", version=str(column.get("version", column["run"])))
    parts = " ".join(f"{weight:+.2f} {name}" for name, weight in mix["parts"]).removeprefix("+")
    return t("mix ({how}): {parts}", how=mix["how"], parts=parts)


def file_name(row: Mapping[str, Any]) -> str:
    """A name for the file, from the prompt: letters and digits of any language."""
    stem = "-".join(re.findall(r"\w+", words.name_of(row)))[:48].strip("-_")
    return f"comparison-{row['id']}{'-' + stem if stem else ''}.html"


def written(folder: Path, row: Mapping[str, Any]) -> Path:
    """Write the file into a folder (`Comparisons.shared`); returns its place."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / file_name(row)
    draft = folder / ".draft"
    draft.write_text(page(row), encoding="utf-8")
    draft.replace(place)
    return place
