"""The process that holds one base model: JSON lines in, JSON lines out, ends when its input ends.

In: `{"id", "op": "generate" | "count" | "cancel", ...}`. Out: `{"id", "type": "progress" | "piece" | "result" |
"done" | "error", ...}`. Requests are answered one after the other; `cancel` is heard at once.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from engine.errors import EngineError
from engine.paths import studio_home
from studio.faults import is_memory, memory_event, unexpected_event

logger = logging.getLogger("studio.inference_worker")

Message = dict[str, Any]


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
            elif message["op"] == "count":
                self._count(request, message)
        except EngineError as error:
            self.send({"id": request, **error.to_event()})
        except Exception as error:
            logger.exception("The request failed.")
            if is_memory(error):
                self.send({"id": request, **memory_event(error)})
                os._exit(1)
            self.send({"id": request, **unexpected_event(error)})

    def _generate(self, request: str, message: Message) -> None:
        from engine.captioning import Captioner
        from engine.generation import Answerer, Sampling
        from engine.labelling import Labeller, labels
        from engine.painting import Painter
        from engine.sheets import write_picture

        def progress(phase: str, fraction: float | None, text: str) -> None:
            self.send({"id": request, "type": "progress", "phase": phase, "fraction": fraction, "message": text})

        adapters: dict[str, str] = message["adapters"]
        make: Any = Captioner
        if message.get("task") == "text_to_image":
            make = Painter
        elif not message["messages"][-1].get("image"):
            make = Labeller if labels(message["base"], [Path(folder) for folder in adapters.values()]) else Answerer
        if not isinstance(self.answerer, make):
            self.answerer, self.attached = None, set()
            self.answerer = make(message["base"], message.get("precision", "auto"), on_progress=progress)
        for name in self.attached - set(adapters):
            self.answerer.detach(name)
            self.attached.discard(name)
        for name, folder in adapters.items():
            if name not in self.attached:
                self.answerer.attach(name, Path(folder))
                self.attached.add(name)
        self.send({"id": request, "type": "progress", "phase": "answering", "fraction": None, "message": "Answering"})
        stream = self.answerer.stream(message["messages"], message["who"], Sampling(**message["sampling"]))
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

        self.send(
            {
                "id": request,
                "type": "result",
                "value": count(message["base"], message["adapter"], message.get("task", "causal_lm")),
            }
        )


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
