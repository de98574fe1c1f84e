"""Adapter Studio: `python app.py [--port N] [--host ADDRESS] [--no-browser]`."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import sys

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

MAX_UPLOAD = "100mb"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="app.py", description="Serve Adapter Studio.")
    parser.add_argument("--port", type=int, default=int(os.environ.get("STUDIO_PORT", "7860")), help="default 7860")
    parser.add_argument(
        "--host", help="address to listen on, by default 127.0.0.1; others than loopback need STUDIO_AUTH"
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser window")
    return parser.parse_args(argv)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def credentials() -> tuple[str, str] | None:
    """`$STUDIO_AUTH` as (user, password); None when it is not set.

    Raises:
        SystemExit: it has another form than `user:password`.
    """
    text = os.environ.get("STUDIO_AUTH", "")
    if not text:
        return None
    user, separator, password = text.partition(":")
    if not (user and separator and password):
        raise SystemExit("STUDIO_AUTH must be user:password.")
    return user, password


def mcp_wanted(demo: bool) -> bool:
    """Whether `STUDIO_MCP=1` asks for tools for language models, and they can be had.

    Raises:
        SystemExit: they cannot; the message says what to do.
    """
    if os.environ.get("STUDIO_MCP", "") != "1":
        return False
    if demo:
        raise SystemExit("STUDIO_MCP is for a studio of one's own; the demo has no tools for language models.")
    if importlib.util.find_spec("mcp") is None:
        raise SystemExit('STUDIO_MCP=1 needs the package mcp: pip install "gradio[mcp]", or leave STUDIO_MCP out.')
    return True


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted. Runs go on after that."""
    asked = arguments(argv)
    login = credentials()
    from studio import demo

    limits = demo.active()
    # A Space is reached from outside its container; in demo mode a visitor can do nothing that login would keep off.
    on_space = bool(os.environ.get("SPACE_ID"))
    host = asked.host or ("0.0.0.0" if on_space and (limits or login) else "127.0.0.1")
    safe = is_loopback(host) or login is not None or (limits is not None and on_space)
    if not safe or (on_space and is_loopback(host) and not asked.host):
        print(
            f"Refused to listen on {host if not safe else 'a Space'}: anyone who reaches it could use this machine.\n"
            "Set STUDIO_AUTH=user:password, or leave --host out to serve this machine only; on a Space, STUDIO_DEMO=1.",
            file=sys.stderr,
        )
        return 2
    with_tools = mcp_wanted(limits is not None)
    from starlette.middleware import Middleware

    from studio import queueing, theme, tools, visits
    from studio.comparisons import Comparisons
    from studio.context import Studio
    from studio.first_page import FirstPage
    from studio.front import Front
    from studio.live_stream import LiveStream
    from studio.shell import create_app

    studio = Studio.open()
    # Before the page is laid out: nothing of earlier visitors may stand in it.
    entrance = demo.Entrance.open(studio)
    kept = Comparisons(studio.store, studio.home)
    kept.forget_pairs()
    kept.forget_pictures()
    studio.works.clear()
    studio.jobs.start_queue()
    app = create_app(studio)
    if with_tools:
        tools.install()
    doors = [] if entrance is None else [entrance.door()]
    ours = [Middleware(Front), Middleware(FirstPage), Middleware(LiveStream, studio=studio)]
    try:
        app.queue(default_concurrency_limit=8)
        queueing.calm(app)
        app.launch(
            server_name=host,
            server_port=asked.port,
            inbrowser=not asked.no_browser,
            auth=login,
            quiet=True,
            prevent_thread_lock=True,
            show_error=False,
            mcp_server=with_tools,
            state_session_capacity=visits.KEPT,
            strict_cors=True,
            allowed_paths=[],
            run_history=False,
            ssr_mode=False,
            share=False,
            enable_monitoring=False,
            footer_links=["api"],
            theme=theme.theme(),
            head=theme.head(),
            max_file_size=MAX_UPLOAD if entrance is None else entrance.limits.upload,
            app_kwargs={"middleware": [*doors, *ours]},
        )
        if with_tools and not app.mcp_server:
            raise SystemExit(f"The tools for language models could not be served. {app.mcp_error or ''}")
        print(f"Adapter Studio is ready at http://{host}:{asked.port} (Ctrl+C ends it; runs go on)", flush=True)
        app.block_thread()
    except KeyboardInterrupt:
        pass
    finally:
        app.close(verbose=False)
        if entrance is not None:
            entrance.close()
        studio.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
