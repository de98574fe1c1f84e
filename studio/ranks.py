"""AdaLoRA's ranks as a picture: where the capacity went, layer by layer, and its mean over the steps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from studio import charts
from studio.i18n import t
from studio.markup import esc
from studio.points import Points

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def place(module: str) -> tuple[str, int | None]:
    """(kind, layer number) of a module's name: its first number is the layer, what is around it the kind.

    `model.layers.3.self_attn.q_proj` is (`self_attn.q_proj`, 3), T5's `decoder.block.1.layer.0.SelfAttention.q`
    (`decoder layer.0.SelfAttention.q`, 1). Without a number the whole name is the kind.
    """
    found = _LAYER.search(module)
    if not found:
        return module, None
    side = next((part for part in module[: found.start()].split(".") if part in ("encoder", "decoder")), "")
    return " ".join(part for part in (side, module[found.end() + 1 :]) if part) or module, int(found.group(1))


def heat_map(ranks: Mapping[str, int], step: int, colour: str) -> str:
    """Kinds of module by layers; the darker, the more rank is left there. Each cell says its number."""
    cells: dict[tuple[str, int | None], int] = {}
    for module, rank in ranks.items():
        cells[place(module)] = rank
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=lambda layer: -1 if layer is None else layer)
    most = max([*ranks.values(), 1])
    head = "".join(f'<th scope="col">{"" if layer is None else layer}</th>' for layer in layers)
    body = ""
    for kind in kinds:
        row = ""
        for layer in layers:
            if (kind, layer) not in cells:
                row += "<td></td>"
                continue
            rank = cells[kind, layer]
            share = round(rank / most * 100)
            dark = " dark" if share > 55 else ""
            row += f'<td class="rank{dark}" style="--c:{esc(colour)};--share:{share}%">{rank}</td>'
        body += f'<tr><th scope="row">{esc(kind)}</th>{row}</tr>'
    total = sum(ranks.values())
    label = t(
        "Ranks after step {step}: {total} in {count} modules, from {least} to {most}",
        step=step,
        total=total,
        count=len(ranks),
        least=min(ranks.values()),
        most=most,
    )
    return (
        f'<figure class="chart ranks"><figcaption><strong>{esc(label)}</strong></figcaption>'
        f'<div class="scroll"><table aria-label="{esc(label)}"><thead><tr><th>{esc(t("layer"))}</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></figure>"
    )


def picture(newest: Mapping[str, Any] | None, means: Points, colour: str, total: float | None) -> str:
    """The newest ranks as a heat map and the mean rank over the steps; nothing for methods that move no rank.

    Args:
        newest: the newest event with ranks.
        means: (step, mean rank).
        colour: the run's.
        total: the run's last step.
    """
    if newest is None:
        return ""
    curve = charts.drawing(t("Mean rank"), [charts.Curve(t("mean rank"), means, colour)], x_max=total, height=130)
    return f'<div class="rank-row">{heat_map(newest["ranks"], int(newest["step"]), colour)}{curve.html()}</div>'
