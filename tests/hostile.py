"""Attacking a studio by its raw protocol: every function of `/config` by its number, with what no page sends."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

Call = tuple[int, list[Any]]
BATCH = 48


@dataclass
class Outcome:
    """What came of one call: whether it answered, and all that it said."""

    function: int
    sent: list[Any]
    success: bool
    said: str


@dataclass
class Attacker:
    """One visitor without a page.

    Attributes:
        address: the server's.
        client: keeps the visitor's cookie.
        functions: number -> its entry in `/config`.
        components: id -> its entry in `/config`.
        parameters: name of a public endpoint -> its parameters' names.
    """

    address: str
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=180))
    functions: dict[int, dict[str, Any]] = field(default_factory=dict)
    components: dict[int, dict[str, Any]] = field(default_factory=dict)
    parameters: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.client.get(f"{self.address}/config").json()
        self.functions = {entry["id"]: entry for entry in config["dependencies"] if entry["backend_fn"]}
        self.components = {entry["id"]: entry for entry in config["components"]}
        named = self.client.get(f"{self.address}/gradio_api/info").json()["named_endpoints"]
        self.parameters = {
            name.lstrip("/"): [it["parameter_name"] for it in entry["parameters"]] for name, entry in named.items()
        }

    def named(self, name: str) -> int:
        """The number of a public endpoint."""
        return next(number for number, entry in self.functions.items() if entry["api_name"] == name)

    def usual(self, number: int, known: dict[str, Any]) -> list[Any]:
        """Arguments as a page or a script would send them; `known` are values by a parameter's name."""
        entry = self.functions[number]
        names = self.parameters.get(entry["api_name"] or "", [])
        found = []
        for place, key in enumerate(entry["inputs"]):
            props = self.components[key]["props"]
            name = names[place] if place < len(names) else str(props.get("elem_id") or "")
            choices = props.get("choices") or []
            first = choices[0][1] if choices else None
            found.append(known.get(name, props.get("value") if props.get("value") is not None else first))
        return found

    def ask(self, calls: Sequence[Call]) -> Iterator[Outcome]:
        """Make the calls, so many at once, in one session."""
        for start in range(0, len(calls), BATCH):
            yield from self._batch(calls[start : start + BATCH])

    def _batch(self, calls: Sequence[Call]) -> Iterator[Outcome]:
        session, open_calls = secrets.token_hex(6), {}
        for number, data in calls:
            body = {"data": data, "fn_index": number, "session_hash": session, "trigger_id": None}
            body["event_data"] = {"run": data[0] if data else "", "adapter": data[0] if data else ""}
            joined = self.client.post(
                f"{self.address}/gradio_api/queue/join",
                content=json.dumps(body),
                headers={"Content-Type": "application/json"},
            )
            if joined.status_code == 200:
                open_calls[joined.json()["event_id"]] = Outcome(number, data, False, "")
            else:
                yield Outcome(number, data, False, joined.text)
        if not open_calls:
            return
        stream = f"{self.address}/gradio_api/queue/data?session_hash={session}"
        with self.client.stream("GET", stream) as lines:
            for line in lines.iter_lines():
                if not line.startswith("data:"):
                    continue
                message = json.loads(line[5:])
                outcome = open_calls.get(message.get("event_id") or "")
                if message["msg"] == "unexpected_error":
                    # Gradio could not write down an answer (an integer of 80 bits): it ends this session's stream.
                    for left in open_calls.values():
                        left.said += message["message"]
                        yield left
                    return
                if outcome is None:
                    continue
                outcome.said += json.dumps(message.get("output"), ensure_ascii=False)
                if message["msg"] == "process_completed":
                    outcome.success = bool(message["success"])
                    yield open_calls.pop(message["event_id"])
                if not open_calls:
                    return
        raise AssertionError(f"no answer to {[it.function for it in open_calls.values()]}")


def texts(secret: Path, tripwire: str, bystander: int) -> list[Any]:
    """Texts that are paths, addresses, flags, ids with something behind them, markup, code."""
    bomb = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    return [
        "../../../../../../etc/passwd",
        str(secret),
        f"file://{secret}",
        tripwire,
        "--help",
        "run-00000000' OR 1=1 --",
        "<script>alert(1)</script><img src=x onerror=alert(1)>",
        "nul\0byte",
        "x" * 30_000,
        f"!!python/object/apply:os.system ['touch {secret.parent}/touched']",
        bomb,
        "~root",
        f"$(touch {secret.parent}/touched); `touch {secret.parent}/touched`",
        str(bystander),
        str(secret.parent / "model"),
        "evil_module.payload",
    ]


def values(secret: Path, tripwire: str) -> list[Any]:
    """Numbers out of bounds, nested objects, files that were never uploaded."""
    deep: Any = "end"
    for _ in range(150):
        deep = [deep]
    meta = {"_type": "gradio.FileData"}
    return [
        1e308,
        -1,
        float("nan"),
        float("inf"),
        2**80,
        None,
        True,
        [],
        {},
        deep,
        {"trust_remote_code": True, "model": str(secret.parent / "model"), "__class__": {"__init__": "x"}},
        {"path": "/etc/passwd", "meta": meta},
        {"path": str(secret), "meta": meta, "orig_name": "../../x.csv"},
        [{"path": str(secret), "meta": meta}],
        {"path": "x", "url": tripwire, "meta": meta},
        {"path": "x", "url": f"file://{secret}", "meta": meta},
        {"__type__": "update", "value": str(secret), "visible": True},
        [[str(secret), 1.0], ["ad-00000000", float("nan")]],
    ]
