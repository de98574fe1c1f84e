"""What Gradio keeps of a visit, without drawing up the whole layout for each.

For every visit Gradio describes each component anew, so that it can keep the values that the visit puts into it. Of a
page with a thousand components that is a twentieth of a second in which the server answers nobody. A component of the
layout is always described alike, so it is described once, and each visit gets its own copy of what it changes.
"""

from __future__ import annotations

import copy
from typing import Any

import gradio as gr
from gradio.blocks import BlocksConfig

KEPT = 500
"""Visits whose values are kept; Gradio's own ten thousand would be gigabytes that strangers can fill. One that is let
go starts anew with its next question; runs, data sets and comparisons stand in the database."""


class Described(dict[str, Any]):
    """A component's description in one visit. Its props are all visits' own until somebody takes them, to write in."""

    __slots__ = ("own",)

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if key != "props" or getattr(self, "own", False):
            return value
        self.own = True
        self[key] = {**value}
        return super().__getitem__(key)


class Visits(BlocksConfig):
    """The components and callbacks of a page, each component described once for all visits."""

    described: dict[int, dict[str, Any]]

    @classmethod
    def of(cls, page: gr.Blocks) -> Visits:
        """What a built page has, to be put in the place of its own `default_config`."""
        return cls._taking(page.default_config, {})

    @classmethod
    def _taking(cls, other: BlocksConfig, described: dict[int, dict[str, Any]]) -> Visits:
        found = cls(other.root_block)
        found._id, found.fn_id = other._id, other.fn_id
        found.blocks, found.fns = copy.copy(other.blocks), copy.copy(other.fns)
        found.renderables = copy.copy(other.renderables)
        found.described = described
        return found

    def __copy__(self) -> Visits:
        """What a visit starts from."""
        return self._taking(self, self.described)

    def config_for_block(  # type: ignore[override] # Gradio's is static; it is only called on an instance
        self, _id: int, rendered_ids: list[int], block: Any, renderable: Any = None
    ) -> dict[str, Any]:
        """A component's description, one's own to change its value in."""
        # Gradio asks with no ids for a visit, and with those that are laid out for the page itself. In a visit another
        # component may stand in the place of one of the layout.
        laid_out: Any = self.root_block.blocks.get(_id)
        if rendered_ids or renderable is not None or laid_out is not block:
            return BlocksConfig.config_for_block(_id, rendered_ids, block, renderable)
        if _id not in self.described:
            self.described[_id] = BlocksConfig.config_for_block(_id, [], block)
        return Described(self.described[_id])
