"""Adapter Studio: `python app.py [--port N] [--host ADDRESS] [--no-browser]`."""

from __future__ import annotations

import argparse
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
        "--host", default="127.0.0.1", help="address to listen on; others than loopback need STUDIO_AUTH"
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


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted. Runs go on after that."""
    asked = arguments(argv)
    login = credentials()
    if not is_loopback(asked.host) and login is None:
        print(
            f"Refused to listen on {asked.host}: anyone who reaches it could use this machine.\n"
            "Set STUDIO_AUTH=user:password, or leave --host out to serve this machine only.",
            file=sys.stderr,
        )
        return 2
    from starlette.middleware import Middleware

    from studio import theme
    from studio.context import Studio
    from studio.first_page import FirstPage
    from studio.shell import create_app

    studio = Studio.open()
    studio.jobs.start_queue()
    app = create_app(studio)
    try:
        app.queue(default_concurrency_limit=8).launch(
            server_name=asked.host,
            server_port=asked.port,
            inbrowser=not asked.no_browser,
            auth=login,
            quiet=True,
            prevent_thread_lock=True,
            show_error=False,
            max_file_size=MAX_UPLOAD,
            strict_cors=True,
            allowed_paths=[],
            run_history=False,
            ssr_mode=False,
            share=False,
            enable_monitoring=False,
            footer_links=["api"],
            theme=theme.theme(),
            css=theme.css(),
            head=theme.head(),
            app_kwargs={"middleware": [Middleware(FirstPage, later=app.later)]},
        )
        print(f"Adapter Studio is ready at http://{asked.host}:{asked.port} (Ctrl+C ends it; runs go on)", flush=True)
        app.block_thread()
    except KeyboardInterrupt:
        pass
    finally:
        app.close(verbose=False)
        studio.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
