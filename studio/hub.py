"""Pushing to the Hugging Face hub: whether it can be done, what leaves, and how. The token stays in the environment.

The token is read from the server's own environment at the moment that it is used, goes to the hub's client and into its
`Authorization` header, and is never kept, shown or logged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.errors import ConfigError, EngineError
from studio import demo
from studio.i18n import t

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Where the hub's client looks for a token, in its order."""

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""What keeps the hub's client from the network."""

USUAL = "https://huggingface.co"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")
_LOCAL = ("127.0.0.1", "localhost", "::1")
_OURS = (".gitattributes",)
"""What the hub itself puts into a new repository."""


Tell = Callable[[str, float | None], None]


class HubError(EngineError):
    """The hub did not take what was pushed."""

    code = "hub"


def token() -> str:
    """The token in the environment, "" without one. A file that `hf auth login` left is nobody's word for a server."""
    return next((os.environ[name].strip() for name in TOKENS if os.environ.get(name, "").strip()), "")


def endpoint() -> str:
    """The hub's address; `$HF_ENDPOINT` names another one, as for the hub's client."""
    return (os.environ.get("HF_ENDPOINT") or USUAL).rstrip("/")


def refusal() -> str:
    """Why nothing can be pushed from here; "" where it can."""
    if demo.active() is not None:
        return t("Pushing is off in the demo.")
    if not token():
        return t("The server has no token. Start it with HF_TOKEN in its environment, a token that may write.")
    if not _TOKEN.fullmatch(token()):
        # The HTTP library would refuse such a header, and say what it holds.
        return t("HF_TOKEN holds characters that no token has. Set it again, and start the server again.")
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE):
        return t("The server is told to stay off the network (HF_HUB_OFFLINE).")
    address = urlsplit(endpoint())
    if address.scheme != "https" and address.hostname not in _LOCAL:
        return t("HF_ENDPOINT is not https, so the token would travel in the open.")
    return ""


def checked_repository(name: Any) -> str:
    """A repository's name as the hub takes it.

    Raises:
        ConfigError: it is none.
    """
    given = name.strip() if isinstance(name, str) else ""
    if not _REPOSITORY.fullmatch(given) or ".." in given or "--" in given or given.endswith((".git", ".ipynb")):
        raise ConfigError(
            f"The repository is named {str(name)[:80]!r}; needed: owner/name.",
            "The owner is your name on the hub, or an organisation's; both have letters, digits, dots, dashes and"
            " underscores.",
        )
    return given


def place(repository: str) -> str:
    """A repository's address."""
    return f"{endpoint()}/{repository}"


def upload(
    folder: Path, repository: str, private: bool, message: str, tell: Callable[[str, float | None], None]
) -> str:
    """Make a repository and put a folder's files into it, as one commit; returns its address.

    A repository of that name that is still empty is taken, if it is as private as asked: an upload that broke off left
    it. One with anything in it is never touched.

    Args:
        folder: what is uploaded, all of it.
        repository: `owner/name`.
        private: whether only its owner sees it.
        message: of the commit.
        tell: told what is done, and the share of bytes that has arrived.

    Raises:
        HubError: the hub cannot be reached, refuses, or has such a repository already.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # They would fill the log; what arrives is told by file.
    disable_progress_bars()
    # Large files go over plain HTTP to addresses that the hub signs: the token is for the hub alone, a refusal has a
    # status. The client's other way (Xet) hands the token to a library that only says that it failed.
    constants.HF_HUB_DISABLE_XET = True
    api = HfApi(endpoint=endpoint(), token=token())
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    total, sent = max(sum(path.stat().st_size for path in paths), 1), 0
    try:
        tell(f"Making {repository}", 0.0)
        _make(api, repository, private)
        operations = []
        for number, path in enumerate(paths, 1):
            tell(f"Uploading {path.name}, {number} of {len(paths)}", sent / total)
            name = path.relative_to(folder).as_posix()
            operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
            # Large files go one by one, small ones ride along with the commit.
            api.preupload_lfs_files(repository, additions=[operation], free_memory=False)
            operations.append(operation)
            sent += path.stat().st_size
        tell("Closing the upload", sent / total)
        api.create_commit(repository, operations=operations, commit_message=message)
    except EngineError:
        raise
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's
        raise explained(error, repository) from error
    return place(repository)


def _make(api: Any, repository: str, private: bool) -> None:
    """Make the repository, or take one of that name that is empty.

    Raises:
        HubError: there is one with something in it, or one that others see and should not.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(repository, private=private, exist_ok=False)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        found = api.repo_info(repository)
        inside = [entry.rfilename for entry in found.siblings or () if entry.rfilename not in _OURS]
        if inside or bool(found.private) != private:
            what = f"with {len(inside)} files in it" if inside else "which is not as private as asked"
            raise HubError(
                f"The name {repository} is taken: there is such a repository, {what}.",
                "Choose another name. What is there is not touched.",
            ) from error


def explained(error: BaseException, repository: str) -> HubError:
    """An error of the hub's client in words."""
    status, said = _answer(error)
    owner = repository.partition("/")[0]
    if status == 401:
        return HubError(
            "The hub does not accept the server's token (401).",
            "Set HF_TOKEN to a token that is valid and may write, and start the server again.",
        )
    if status == 403:
        return HubError(
            f"The server's token may not write to {owner} on the hub (403).{said}",
            "Name an owner that the token belongs to, or give the token the right to write.",
        )
    if status == 409:
        return HubError(f"The name {repository} is taken on the hub (409).{said}", "Choose another name.")
    if status:
        return HubError(f"The hub answered with status {status}.{said}", "Try again later; nothing here was changed.")
    return HubError(
        f"The hub at {endpoint()} cannot be reached: {_cause(error)}.",
        "Check the connection of the server, then try again.",
    )


def _answer(error: BaseException | None) -> tuple[int, str]:
    """The status and the hub's own words of the answer behind an error; 0 where there was no answer."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None and getattr(response, "status_code", None):
            words = str(getattr(error, "server_message", None) or "").strip()[:200]
            return int(response.status_code), f" It says: {words}" if words else ""
        error = error.__cause__ or error.__context__
    return 0, ""


def _cause(error: BaseException) -> str:
    """The innermost cause in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
