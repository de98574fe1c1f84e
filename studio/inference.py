"""The page's side of the inference process: start it, ask it, read its answers, survive its end."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from studio import bases, demo, process

logger = logging.getLogger("studio.inference")

Message = dict[str, Any]


class InferenceError(EngineError):
    """What the inference process reported, or that it ended; `code` is the reported one."""

    code = "inference-ended"

    def __init__(self, message: str, hint: str = "", code: str | None = None) -> None:
        super().__init__(message, hint)
        if code:
            self.code = code


class RefusedError(InferenceError):
    """A job that cannot run; `field` is the setting to blame, or ""."""

    def __init__(self, message: str, hint: str, code: str, field: str) -> None:
        super().__init__(message, hint, code)
        self.field = field


@dataclass
class _Child:
    """One process, the base it holds, and the open requests."""

    popen: subprocess.Popen[str]
    base: str | None
    waiting: dict[str, queue.Queue[Message | None]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: bool = False

    def write(self, message: Message, box: queue.Queue[Message | None] | None = None) -> None:
        """Send one line; `box` gets the answers, or None when the process has ended."""
        with self.lock:
            if self.ended:
                raise OSError("the inference process has ended")
            if box is not None:
                self.waiting[message["id"]] = box
            assert self.popen.stdin is not None
            self.popen.stdin.write(json.dumps(message, ensure_ascii=False) + "\n")
            self.popen.stdin.flush()

    def rest(self, seconds: float) -> None:
        """Wait until nobody waits for an answer any more, at most so long."""
        deadline = time.monotonic() + seconds
        while self.waiting and not self.ended and time.monotonic() < deadline:
            time.sleep(0.2)

    def read(self) -> None:
        """Hand each answer to its request; at the end tell all that are left."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                box = self.waiting.get(message.get("id"))
                if box is not None:
                    box.put(message)
        self.popen.wait()
        with self.lock:
            self.ended = True
            # A copy: whoever has given up takes its box out without the lock.
            for box in list(self.waiting.values()):
                box.put(None)


_LOOK = 0.1
"""Seconds between two looks whether a question is still wanted."""


class Inference:
    """Answers prompts and counts parameters in a process of its own, started when first needed.

    Asking for another base ends the process that holds the present one: that is what frees its memory.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def generate(
        self,
        base: str,
        adapters: Mapping[str, Path],
        messages: Sequence[Mapping[str, str]],
        who: Sequence[str | Mapping[str, float] | None],
        sampling: Mapping[str, Any],
        task: str = "causal_lm",
        blends: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Generator[Message, None, None]:
        """`progress` and `piece` messages until all columns are done. Closing the iterator cancels the request.

        Args:
            base: base model.
            adapters: name -> folder; others that were attached before are let go.
            messages: the conversation to answer.
            who: the columns: None for the base, a name of `adapters` or `blends`, or a live mix as name -> weight.
            sampling: fields of `engine.generation.Sampling`.
            task: what the base is for; of `text_to_image` the pieces have a `picture`, the path of a PNG.
            blends: name -> fields of `engine.combinations.Blend`: combinations of `adapters` that are made in memory
                and stay until something else is asked for.

        Raises:
            InferenceError: the process reported an error or ended.
        """
        folders = {name: str(folder) for name, folder in adapters.items()}
        request = {
            "op": "generate",
            "base": base,
            "adapters": folders,
            "messages": list(messages),
            "who": list(who),
            "sampling": dict(sampling),
            "task": task,
            "blends": {name: dict(fields) for name, fields in (blends or {}).items()},
        }
        yield from self._ask(request, base)

    def mix(
        self,
        base: str,
        adapters: Mapping[str, Path],
        weights: Sequence[float],
        blend: Mapping[str, Any],
        messages: Sequence[Mapping[str, str]],
        sampling: Mapping[str, Any],
        task: str = "causal_lm",
    ) -> Generator[Message, None, None]:
        """As `generate`, one column, answered by the adapters together; only weights change between two calls.

        Args:
            base, messages, sampling, task: as `generate`.
            adapters: name -> folder.
            weights: one for each adapter, in order.
            blend: the other fields of `engine.combinations.Blend`.

        Raises:
            InferenceError: as `generate`; or the adapters cannot be mixed so.
        """
        request = {
            "op": "mix",
            "base": base,
            "adapters": {name: str(folder) for name, folder in adapters.items()},
            "weights": list(weights),
            "blend": dict(blend),
            "messages": list(messages),
            "sampling": dict(sampling),
            "task": task,
        }
        yield from self._ask(request, base)

    def rank_errors(self, base: str, name: str, folder: Path, task: str) -> list[float]:
        """What `engine.resize.rank_errors` says of an adapter: entry r - 1 is the error that rank r costs.

        Raises:
            InferenceError: the adapter has no rank that can be changed, or the process ended.
        """
        request = {"op": "rank_errors", "base": base, "adapters": {name: str(folder)}, "task": task}
        return list(self._result(request, base)["errors"])

    def _result(self, request: Message, base: str | None) -> Message:
        for message in self._ask(request, base):
            if message["type"] == "result":
                value: Message = message["value"]
                return value
        raise InferenceError("There was no answer.", "Try again.")

    def count(
        self,
        base: str,
        adapter: Mapping[str, Any],
        task: str = "causal_lm",
        options: Mapping[str, Any] | None = None,
    ) -> Message:
        """What `engine.inspection.count` says about an adapter on a base with the head of a task.

        Raises:
            InferenceError: the fields do not fit the base, the base cannot be found, or the process ended.
        """
        request = {"op": "count", "base": base, "adapter": dict(adapter), "task": task, "options": dict(options or {})}
        return self._result(request, None)

    def tokens(
        self,
        base: str,
        task: str,
        examples: Sequence[Mapping[str, Any]],
        *,
        want: str = "rows",
        options: Mapping[str, Any] | None = None,
        max_length: int = 512,
        loss_on: str = "answers",
    ) -> list[Any]:
        """What `engine.preview` says of rows: with `want="rows"` its `shown`, with `"lengths"` its `lengths`.

        The process needs only the base's tokenizer for it, whatever base it holds.

        Raises:
            InferenceError: the base cannot be found, the settings cannot be used, or the process ended.
        """
        request = {
            "op": "tokens",
            "base": base,
            "task": task,
            "examples": list(examples),
            "want": want,
            "options": dict(options or {}),
            "max_length": max_length,
            "loss_on": loss_on,
        }
        return list(self._result(request, None)["rows"])

    def estimate(
        self, spec: Mapping[str, Any], wanted: Callable[[], bool] = lambda: True
    ) -> Generator[Message, None, None]:
        """What `engine.memory.preview.stages` says of a job, given as plain data. Closing the iterator ends the work.

        While somebody asks the process for an answer it waits, and then begins anew: a stage may come twice. It ends
        soon after `wanted` is false, in the middle of a stage too.

        Raises:
            RefusedError: the job cannot run; it says which setting is to blame, where that is known.
            InferenceError: the process ended.
        """
        yield from self._stages({"op": "estimate", "spec": dict(spec)}, wanted)

    def method_costs(
        self,
        spec: Mapping[str, Any],
        adapters: Sequence[Mapping[str, Any]],
        wanted: Callable[[], bool] = lambda: True,
    ) -> Generator[Message, None, None]:
        """What `engine.memory.preview.methods` says of other adapters in place of a job's own; `wanted` as above.

        Raises:
            InferenceError: the process ended, or the job is none.
        """
        request = {"op": "methods", "spec": dict(spec), "adapters": [dict(each) for each in adapters]}
        yield from self._stages(request, wanted)

    def _stages(self, request: Message, wanted: Callable[[], bool]) -> Generator[Message, None, None]:
        for message in self._ask(request, None, wanted):
            if message["type"] == "stage":
                value: Message = message["value"]
                if value.get("stage") == "refused":
                    raise RefusedError(value["message"], value["hint"], value["code"], value["field"])
                yield value

    def holds(self, base: str) -> bool:
        """Whether the process lives and was last asked for this base, so that an answer begins at once."""
        child = self._child
        return child is not None and child.base == base and child.popen.poll() is None

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def _ask(
        self, request: Message, base: str | None, wanted: Callable[[], bool] | None = None
    ) -> Generator[Message, None, None]:
        job = request.get("spec", {})
        bases.checked(self.home, job.get("model") if "spec" in request else request["base"])
        described = [request["adapter"]] if request["op"] == "count" else [job.get("adapter") or {}]
        for adapter in [*described, *(request["adapters"] if request["op"] == "methods" else [])]:
            bases.check_adapter(self.home, adapter)
        demo.check_question(request.get("sampling", {}))
        request = {"id": secrets.token_hex(8), **request}
        box: queue.Queue[Message | None] = queue.Queue()
        child = self._reach(request, base, box)
        finished = heard = False
        try:
            while True:
                try:
                    message = box.get(timeout=_LOOK if wanted else None)
                except queue.Empty:
                    if wanted and not wanted():
                        return
                    continue
                if message is None and not heard and child.popen.returncode == 0:
                    # Its idle time ran out just as we asked.
                    heard = True
                    child = self._reach(request, base, box)
                    continue
                heard = True
                if message is None:
                    finished = True
                    raise self._ended(child)
                kind = message["type"]
                finished = kind in ("done", "result", "error")
                if kind == "error":
                    raise InferenceError(message["message"], message.get("hint", ""), message["code"])
                if kind == "done":
                    return
                yield message
                if finished:
                    return
        finally:
            child.waiting.pop(request["id"], None)
            if not finished:
                with contextlib.suppress(OSError, ValueError):
                    child.write({"id": request["id"], "op": "cancel"})

    def _reach(self, request: Message, base: str | None, box: queue.Queue[Message | None]) -> _Child:
        """Send the request to a process that can answer it, started anew where the old one cannot or has ended."""
        with self._lock:
            for _ in range(2):
                child = self._ready(base)
                try:
                    child.write(request, box)
                    return child
                except (OSError, ValueError):
                    # It ended between the check and the write, for example by its idle timeout.
                    self._end()
        raise InferenceError(
            "The inference process does not start.", "Its log is logs/inference.log in the home folder."
        )

    def _ready(self, base: str | None) -> _Child:
        child = self._child
        if child is not None and child.popen.poll() is None:
            if base is None or child.base in (None, base):
                child.base = child.base or base
                return child
            child.rest(demo.patience())
            self._end()
        self._child = self._start(base)
        return self._child

    def _start(self, base: str | None) -> _Child:
        logs = self.home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "inference.log").open("a", encoding="utf-8") as log:
            popen = subprocess.Popen(
                [sys.executable, "-m", "studio.inference_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=process.environment(self.home),
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
        child = _Child(popen, base)
        threading.Thread(target=child.read, name="inference-answers", daemon=True).start()
        return child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        started = process.started_at(child.popen.pid)
        with contextlib.suppress(OSError, ValueError):
            assert child.popen.stdin is not None
            child.popen.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.popen.wait(timeout=3)
        process.end(child.popen.pid, started, grace=1.0)
        child.popen.wait()

    def _ended(self, child: _Child) -> InferenceError:
        status = child.popen.returncode
        if status is not None and status < 0:
            return InferenceError(
                f"The process that holds the base was killed (signal {-status}); most often memory ran out.",
                "Ask again to start it anew; choose fewer adapters or a smaller base if it happens again.",
            )
        return InferenceError(
            "The process that holds the base has ended.",
            "Ask again to start it anew; its log is logs/inference.log in the home folder.",
        )
