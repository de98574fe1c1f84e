"""Tools for language models by the Model Context Protocol (`STUDIO_MCP=1`): reading what was trained, and asking it.

Gradio would offer every public endpoint. Here are only those that start, change, delete and export nothing.
"""

from __future__ import annotations

TOOLS = (
    "list_datasets",
    "list_runs",
    "run_status",
    "run_scores",
    "leaderboard",
    "list_adapters",
    "list_mixes",
    "adapter_work",
    "rank_errors",
    "list_columns",
    "list_comparisons",
    "win_rates",
    "compare",
    "mix",
)
"""Endpoints that are tools, each under its own name."""


def install() -> None:
    """Let the server that Gradio is about to make know of `TOOLS` alone, in its list and in its calls.

    Raises:
        ImportError: the package `mcp` is not installed.
    """
    import gradio.mcp
    import mcp as mcp

    class Tools(gradio.mcp.GradioMCPServer):
        """Gradio's server with our list of tools."""

        def get_tool_to_endpoint(self) -> dict[str, str]:
            """Tool -> endpoint."""
            named = self.api_info["named_endpoints"]
            return {name: f"/{name}" for name in TOOLS if f"/{name}" in named}

    gradio.mcp.GradioMCPServer = Tools  # type: ignore[misc]
