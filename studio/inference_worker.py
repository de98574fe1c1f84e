"""The process that holds one base model: JSON lines in, JSON lines out, ends when its input ends.

In: `{"id", "op": "generate" | "mix" | "rank_errors" | "count" | "tokens" | "estimate" | "methods" | "cancel", ...}`.
Out: `{"id", "type": "progress" | "piece" | "stage" | "result" | "done" | "error", ...}`. Requests are answered one
after the other; `cancel` is heard at once.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from engine.errors import EngineError
from engine.paths import studio_home
from studio.faults import is_memory, memory_event, unexpected_event

logger = logging.getLogger("studio.inference_worker")

Message = dict[str, Any]

FORETELLING = ("estimate", "methods")
"""Requests that take long and nobody is kept waiting by: they give way to all others, and begin anew after them."""


@dataclass
class Server:
    """One conversation over a pair of pipes.

    Attributes:
        out: where answers go; nothing else is written there.
        idle: seconds without a request after which the process ends and frees its memory.
    """

    out: TextIO
    idle: float = 300.0
    requests: queue.Queue[Message] = field(default_factory=queue.Queue)
    cancelled: set[str] = field(default_factory=set)
    answerer: Any = None
    attached: set[str] = field(default_factory=set)
    blender: Any = None

    def send(self, message: Message) -> None:
        """One line to the client."""
        self.out.write(json.dumps(message, ensure_ascii=False) + "\n")
        self.out.flush()

    def listen(self, lines: Iterable[str]) -> None:
        """Read requests until the input ends; then the process ends, whatever it is doing."""
        for line in lines:
            message = json.loads(line)
            if message["op"] == "cancel":
                self.cancelled.add(message["id"])
            else:
                self.requests.put(message)
        os._exit(0)

    def serve(self) -> None:
        """Answer requests until none comes for `idle` seconds."""
        while True:
            try:
                message = self.requests.get(timeout=self.idle)
            except queue.Empty:
                return
            if message["id"] not in self.cancelled:
                self._answer(message)
            self.cancelled.discard(message["id"])

    def _answer(self, message: Message) -> None:
        """Answer one request; after an out-of-memory the process ends, which is what frees everything."""
        request = message["id"]
        try:
            if message["op"] == "generate":
                self._generate(request, message)
            elif message["op"] == "mix":
                self._mix(request, message)
            elif message["op"] == "rank_errors":
                self._rank_errors(request, message)
            elif message["op"] == "count":
                self._count(request, message)
            elif message["op"] == "tokens":
                self._tokens(request, message)
            elif message["op"] == "estimate":
                self._estimate(request, message)
            elif message["op"] == "methods":
                self._methods(request, message)
        except EngineError as error:
            self.send({"id": request, **error.to_event()})
        except Exception as error:
            logger.exception("The request failed.")
            if is_memory(error):
                self.send({"id": request, **memory_event(error)})
                os._exit(1)
            self.send({"id": request, **unexpected_event(error)})

    def _generate(self, request: str, message: Message) -> None:
        from engine.generation import Sampling

        self._prepare(request, message)
        self._pieces(
            request, self.answerer.stream(message["messages"], message["who"], Sampling(**message["sampling"]))
        )

    def _mix(self, request: str, message: Message) -> None:
        """One column from the adapters together: only the switchboard changes, or a combination is made once."""
        from engine.combinations import LIVE, Blend
        from engine.generation import Sampling

        names = list(message["adapters"])
        blend = Blend(dict(zip(names, message["weights"], strict=True)), **message["blend"])
        self._prepare(request, message)
        if blend.how != LIVE:
            self._tell(request, "combining", None, "Combining the adapters")
        with self.blender.applied(self.answerer.parts, blend):
            self._pieces(
                request, self.answerer.as_switched(message["messages"], names, Sampling(**message["sampling"]))
            )

    def _rank_errors(self, request: str, message: Message) -> None:
        from engine.resize import rank_errors

        self._prepare(request, message)
        (name,) = message["adapters"]
        told = [rank_errors(part, name) for part in self.answerer.parts.values() if name in part.peft_config]
        # Of a pipeline's parts, the one that suffers most.
        longest = max(len(errors) for errors in told)
        value = [max(errors[r] if r < len(errors) else 0.0 for errors in told) for r in range(longest)]
        self.send({"id": request, "type": "result", "value": {"errors": value}})

    def _tell(self, request: str, phase: str, fraction: float | None, text: str) -> None:
        self.send({"id": request, "type": "progress", "phase": phase, "fraction": fraction, "message": text})

    def _prepare(self, request: str, message: Message) -> None:
        """The base in memory with exactly these adapters on it; what is there already stays."""
        from engine.blending import Blender, attach_blend
        from engine.combinations import Blend

        adapters: dict[str, str] = message["adapters"]
        blends: dict[str, Message] = message.get("blends", {})
        make = self._answerer_class(message, adapters)
        if not isinstance(self.answerer, make):
            self.answerer, self.attached, self.blender = None, set(), Blender()

            def progress(phase: str, fraction: float | None, text: str) -> None:
                self._tell(request, phase, fraction, text)

            self.answerer = make(message["base"], message.get("precision", "auto"), on_progress=progress)
        wanted = {*adapters, *blends}
        if self.attached != wanted:
            self.blender.clear()
        for name in self.attached - wanted:
            self.answerer.detach(name)
            self.attached.discard(name)
        for name, folder in adapters.items():
            if name not in self.attached:
                self.answerer.attach(name, Path(folder))
                self.attached.add(name)
        for name, fields in blends.items():
            if name not in self.attached:
                self._tell(request, "combining", None, "Combining the adapters")
                attach_blend(self.answerer, Blend(**fields), name)
                self.attached.add(name)
        self._tell(request, "answering", None, "Answering")

    def _answerer_class(self, message: Message, adapters: dict[str, str]) -> Any:
        from engine.answerers import answerer_class
        from engine.labelling import labels

        task = message.get("task", "")
        if message.get("messages") and task not in ("text_to_image", "classification"):
            pictured = bool(message["messages"][-1].get("image"))
            folders = [Path(folder) for folder in adapters.values()]
            task = "captioning" if pictured else "classification" if labels(message["base"], folders) else "causal_lm"
        return answerer_class(task)

    def _pieces(self, request: str, stream: Generator[Any, None, None]) -> None:
        """Send what comes until it ends or nobody wants it any more."""
        from engine.sheets import write_picture

        for piece in stream:
            if request in self.cancelled:
                stream.close()
                self.cancelled.discard(request)
                break
            drawn = {}
            if piece.picture is not None:
                name = f"{time.strftime('%Y%m%d-%H%M%S')}-{request}-{piece.index}.png"
                drawn = {"picture": str(write_picture(piece.picture, studio_home() / "pictures" / name))}
            self.send(
                {
                    "id": request,
                    "type": "piece",
                    "index": piece.index,
                    "text": piece.text,
                    "done": piece.done,
                    "reason": piece.reason,
                    **drawn,
                }
            )
        self.send({"id": request, "type": "done"})

    def _count(self, request: str, message: Message) -> None:
        from engine.inspection import count

        task, options = message.get("task", "causal_lm"), message.get("options")
        value = count(message["base"], message["adapter"], task, options)
        self.send({"id": request, "type": "result", "value": value})

    def _tokens(self, request: str, message: Message) -> None:
        """Rows as the tokens that a run would see; needs a tokenizer, and no base in memory."""
        from engine import preview

        def progress(phase: str, fraction: float | None, text: str) -> None:
            self._tell(request, phase, fraction, text)

        reader = preview.reader(
            message["base"],
            message["task"],
            message["options"],
            message["max_length"],
            message["loss_on"],
            progress,
        )
        give = preview.shown if message["want"] == "rows" else preview.lengths
        self.send({"id": request, "type": "result", "value": {"rows": give(reader, message["examples"])}})

    def _estimate(self, request: str, message: Message) -> None:
        """A job's costs before it starts; a job that cannot run is a stage too, with the setting to blame."""
        from engine.memory.preview import culprit, stages
        from engine.train.job import JobSpec

        spec, going = JobSpec.from_dict(message["spec"]), self._going(request)
        try:
            self._send_stages(message, stages(spec, going), going)
        except EngineError as error:
            value = {**error.to_event(), "stage": "refused", "field": culprit(spec, error)}
            self._send_stages(message, [value], going)

    def _methods(self, request: str, message: Message) -> None:
        from engine.memory.preview import methods
        from engine.train.job import JobSpec

        spec = JobSpec.from_dict(message["spec"])
        going = self._going(message["id"])
        self._send_stages(message, methods(spec, message["adapters"], going), going)

    def _going(self, request: str) -> _Going:
        """Whether foretelling goes on: somebody still waits for it, and nobody for an answer."""
        return _Going(
            lambda: request not in self.cancelled,
            lambda: any(one["op"] not in FORETELLING for one in list(self.requests.queue)),
        )

    def _send_stages(self, message: Message, found: Iterable[Message], going: _Going) -> None:
        """What is foretold, stage by stage; where an answer went before, all of it once more after that."""
        for value in found:
            self.send({"id": message["id"], "type": "stage", "value": value})
        if going.gave_way:
            self.requests.put(message)
        else:
            self.send({"id": message["id"], "type": "done"})


class _Going:
    """Asked all the time by what foretells; False ends it."""

    def __init__(self, waited_for: Callable[[], bool], others: Callable[[], bool]) -> None:
        self.waited_for = waited_for
        self.others = others
        self.gave_way = False

    def __call__(self) -> bool:
        """Whether to go on."""
        if not self.waited_for():
            return False
        self.gave_way = self.others()
        return not self.gave_way


def main() -> int:
    """Keep the answers' pipe to ourselves: whatever a library prints goes to the log instead."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    server = Server(out, idle=float(os.environ.get("STUDIO_INFERENCE_IDLE", "300")))
    threading.Thread(target=server.listen, args=(sys.stdin,), daemon=True).start()
    server.serve()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
