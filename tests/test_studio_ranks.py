"""The picture of AdaLoRA's ranks."""

from __future__ import annotations

import re

import pytest

from studio import ranks


@pytest.mark.parametrize(
    ("module", "kind", "layer"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj", 3),
        ("transformer.h.11.attn.c_attn", "attn.c_attn", 11),
        ("decoder.block.1.layer.0.SelfAttention.q", "decoder layer.0.SelfAttention.q", 1),
        ("encoder.block.1.layer.0.SelfAttention.q", "encoder layer.0.SelfAttention.q", 1),
        ("head", "head", None),
    ],
)
def test_a_modules_name_is_a_kind_and_a_layer(module: str, kind: str, layer: int | None) -> None:
    assert ranks.place(module) == (kind, layer)


def test_each_module_has_its_cell_with_its_rank() -> None:
    last = {"model.layers.0.q_proj": 0, "model.layers.1.q_proj": 9, "model.layers.1.v_proj": 3}
    drawn = ranks.picture({"step": 5, "ranks": last}, [(1.0, 12.0), (5.0, 4.0)], "#123456", 10)
    assert "Ranks after step 5: 12 in 3 modules, from 0 to 9" in drawn
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', drawn)
    assert [(kind, re.findall(r">(\d*)</td>", cells)) for kind, cells in rows] == [
        ("q_proj", ["0", "9"]),
        ("v_proj", ["", "3"]),
    ]
    assert "Mean rank" in drawn


def test_nothing_where_no_rank_moves() -> None:
    assert ranks.picture(None, [], "#123456", 10) == ""


def test_names_are_escaped() -> None:
    assert "<script>" not in ranks.picture({"step": 1, "ranks": {"<script>.0.x": 1}}, [], "#123456", None)
