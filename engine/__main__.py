"""`python -m engine train | eval | generate | export | doctor`: the engine without a page.

With `--json`, standard output carries one JSON object a line and nothing else; words for people go to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import __version__
from engine.errors import ConfigError, EngineError
from engine.exporting import FORMS
from engine.llamacpp import PRECISIONS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when it did what was asked (a run that was stopped is 3), 1 after an error of ours, 2 for wrong arguments.
    """
    arguments = _parser().parse_args(argv)
    # Before torch is imported: afterwards the setting has no effect.
    from engine import threads

    try:
        count, processes = getattr(arguments, "threads", None), getattr(arguments, "processes", 1)
        threads.apply(count or (max(1, threads.available_cores() // processes) if processes > 1 else None))
        return int(arguments.command(arguments))
    except EngineError as error:
        if arguments.json:
            print(json.dumps(error.to_event(), ensure_ascii=False), flush=True)
        print(f"Error: {error.message}", file=sys.stderr)
        if error.hint:
            print(error.hint, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine", description="Fine-tune adapters and use them.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train an adapter from a job file")
    train.add_argument("job", type=Path, help="a YAML or JSON job")
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    train.add_argument("--threads", type=int, help="CPU threads of each process (default: chosen for this machine)")
    train.add_argument("--processes", type=int, default=1, help="share every step between so many processes or GPUs")
    train.add_argument(
        "--strategy", default="ddp", choices=("ddp", "fsdp"), help="each process holds the base, or a part of it"
    )
    train.add_argument("--json", action="store_true", help="print one event a line")
    train.set_defaults(command=_train)

    score = commands.add_parser("eval", help="score base and adapter on a job's held-out rows")
    score.add_argument("job", type=Path, help="the YAML or JSON job that the adapter was trained by")
    score.add_argument("--adapter", type=Path, required=True, help="adapter folder")
    score.add_argument("--rows", type=int, default=0, help="show so many rows with both answers")
    score.add_argument("--answers", type=int, default=64, help="rows answered in words for metrics of texts")
    score.add_argument("--out", type=Path, help="folder for a contact sheet of the rows that are shown")
    score.add_argument("--threads", type=int)
    score.add_argument("--json", action="store_true", help="print one score a line")
    score.add_argument("--progress", action="store_true", help="with --json: also print what is being done")
    score.set_defaults(command=_eval)

    generate = commands.add_parser("generate", help="answer a prompt with the base and with adapters")
    generate.add_argument("--model", required=True, help="built-in name, local folder or hub id")
    generate.add_argument("--adapter", type=Path, action="append", default=[], help="adapter folder; may be repeated")
    asked = generate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt")
    asked.add_argument("--image", type=Path, help="a picture to describe, for captioning models")
    generate.add_argument("--system", default="", help="a system message before the prompt")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    generate.add_argument("--top-p", type=float, default=0.9)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--beams", type=int, default=4, help="of T5-like models at temperature 0")
    generate.add_argument("--steps", type=int, default=20, help="of pictures: how often noise is taken away")
    generate.add_argument("--guidance", type=float, default=7.5, help="of pictures: how much the words count")
    generate.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    generate.add_argument("--out", type=Path, help="also write the results there, as results.json, and pictures")
    generate.add_argument("--threads", type=int)
    generate.add_argument("--json", action="store_true", help="print one result a line")
    generate.set_defaults(command=_generate)

    export = commands.add_parser("export", help="write an adapter, or its base with it, for other programs")
    export.add_argument("--model", required=True, help="the base: built-in name, local folder or hub id")
    export.add_argument("--adapter", type=Path, help="adapter folder; without one, gguf writes the model itself")
    export.add_argument("--form", required=True, choices=FORMS)
    export.add_argument("--out", type=Path, required=True, help="the file to write; for merged, the folder")
    export.add_argument("--precision", default="f16", choices=PRECISIONS, help="of a GGUF model's matrices")
    export.add_argument("--task", default="", help="what the adapter is for, where that cannot be told (captioning)")
    export.add_argument("--threads", type=int)
    export.add_argument("--json", action="store_true", help="print what is done, and what was written, as JSON lines")
    export.set_defaults(command=_export)

    doctor = commands.add_parser("doctor", help="what this machine has, whether a job fits it, what a run's curve says")
    doctor.add_argument("--fit", type=Path, metavar="JOB", help="predict the peak memory of a YAML or JSON job")
    doctor.add_argument("--run", type=Path, metavar="FOLDER", help="what a run's curve says, and what to change")
    doctor.add_argument("--budget", help="memory that it may take, such as 8GB (default: what is free now)")
    doctor.add_argument("--device", choices=("cpu", "cuda"), help="where it would train (default: as training would)")
    doctor.add_argument("--threads", type=int)
    doctor.add_argument("--json", action="store_true", help="print one object")
    doctor.set_defaults(command=_doctor)
    return parser


class _Words:
    """Events as lines for a person."""

    def emit(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "step":
            print(
                f"step {event['step']:>5}  loss {event['loss']:.4f}  lr {event['lr']:.2e}  "
                f"grad {event['grad_norm']:.2f}  {event['tokens_per_s']:.0f} tokens/s  {event['eta_s']:.0f} s left"
            )
        elif kind == "eval":
            print(f"step {event['step']:>5}  evaluation loss {event['loss']:.4f}")
        elif kind == "sample":
            print(f"step {event['step']:>5}  {event['prompt']!r} -> {event.get('file') or repr(event['text'])}")
        elif kind == "start":
            share = event["trainable"] / event["parameters"]
            print(f"training {event['trainable']:,} of {event['parameters']:,} parameters ({share:.2%})")
        elif kind in ("status", "warning"):
            print(f"{kind}: {event['message']}", file=sys.stderr)
        elif kind in ("done", "stopped", "paused"):
            result = event.get("adapter") or event.get("model") or event.get("checkpoint")
            print(f"{kind} at step {event['step']}: {result}")


def _train(arguments: argparse.Namespace) -> int:
    from engine.train.events import EventFile, JsonLines, SignalControl, Sink, Tee
    from engine.train.job import JobSpec
    from engine.train.worker import run

    spec = JobSpec.from_file(arguments.job)
    kept = EventFile(arguments.out)
    sink: Sink = Tee([JsonLines(sys.stdout) if arguments.json else _Words(), kept])
    others = _others(arguments, sink) if arguments.processes != 1 else None
    try:
        state = run(spec, arguments.out, sink, SignalControl(), arguments.resume)
    except EngineError as error:
        # One that came before the first event is about the call, not about the run.
        if kept.used:
            kept.emit(error.to_event())
        raise
    except RuntimeError as error:
        # A message between processes fails before it is known which of them has gone.
        gone = others.failure(patience=5.0) if others else None
        if gone is None:
            raise
        raise gone from error
    finally:
        if others:
            others.finish()
    return 0 if state == "done" else 3


def _others(arguments: argparse.Namespace, sink: Any) -> Any:
    """Start the other processes of a run, each by this same command without `--processes`."""
    from engine.train import parallel

    command = [sys.executable, "-m", "engine", "train", str(arguments.job), "--out", str(arguments.out), "--json"]
    command += ["--resume"] if arguments.resume else []
    return parallel.start(arguments.processes, arguments.strategy, command, sink)


def _eval(arguments: argparse.Namespace) -> int:
    from engine.evaluation import evaluate_job
    from engine.train.job import JobSpec

    if arguments.rows < 0 or arguments.answers < 0:
        raise ConfigError(f"--rows {arguments.rows} --answers {arguments.answers}: needed: 0 or more of each.")

    def tell(phase: str, fraction: float | None, message: str) -> None:
        if arguments.json and arguments.progress:
            status = {"type": "status", "phase": phase, "fraction": fraction, "message": message}
            print(json.dumps(status, ensure_ascii=False), flush=True)
        elif not arguments.json and fraction is None:
            print(message, file=sys.stderr)

    spec, noted = JobSpec.from_file(arguments.job), False
    for event in evaluate_job(
        spec, arguments.adapter, tell, answered=arguments.answers, shown=arguments.rows, out=arguments.out
    ):
        if arguments.json:
            print(json.dumps(event, ensure_ascii=False), flush=True)
        elif event["type"] == "score":
            print(f"{event['who']:<8} {event['metric']:<12} {event['value']:.4f}  ({event['rows']} rows)")
            if event.get("note") and not noted:
                noted = True
                print(event["note"], file=sys.stderr)
        elif event["type"] == "row":
            print(f"--- row {event['row']}: {event['prompt']}")
            print("\n".join(f"{who:<8} {event[who]}" for who in ("wanted", "base", "adapter")))
        else:
            print(f"{event['type']}: {event.get('message') or event.get('file')}", file=sys.stderr)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from engine.captioning import Captioner
    from engine.generation import Answerer, Sampling
    from engine.labelling import Labeller, labels

    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        beams=arguments.beams,
        steps=arguments.steps,
        guidance=arguments.guidance,
    )
    messages = [{"role": "user", "content": arguments.prompt or ""}]
    if arguments.image:
        messages[0]["image"] = str(arguments.image)
    if arguments.system:
        messages.insert(0, {"role": "system", "content": arguments.system})
    from engine.models.pipelines import named_pipeline

    make: Any = Captioner
    if not arguments.image and named_pipeline(arguments.model):
        if arguments.out is None:
            raise ConfigError(f"{arguments.model} answers with pictures.", "Name a folder for them by --out.")
        from engine.painting import Painter

        make = Painter
    elif not arguments.image:
        make = Labeller if labels(arguments.model, arguments.adapter) else Answerer
    answerer = make(arguments.model, arguments.precision)
    names: list[str | None] = [None]
    for number, folder in enumerate(arguments.adapter):
        names.append(f"adapter-{number}")
        answerer.attach(f"adapter-{number}", folder)
    texts, reasons = [""] * len(names), [""] * len(names)
    files: list[str | None] = [None] * len(names)
    for piece in answerer.stream(messages, names, sampling):
        texts[piece.index] += piece.text
        reasons[piece.index] = piece.reason or reasons[piece.index]
        if piece.picture is not None:
            from engine.sheets import write_picture

            path = arguments.out / f"{names[piece.index] or 'base'}.png"
            files[piece.index] = str(write_picture(piece.picture, path))
    results = [
        {
            "type": "result",
            "who": "base" if number == 0 else "adapter",
            "adapter": str(arguments.adapter[number - 1]) if number else None,
            "prompt": arguments.prompt or str(arguments.image),
            "text": texts[number],
            "reason": reasons[number],
            "seed": arguments.seed,
            **({"file": files[number]} if files[number] else {}),
        }
        for number in range(len(names))
    ]
    for result in results:
        if arguments.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
        else:
            print(f"--- {result['adapter'] or 'base'}\n{result.get('file') or result['text']}\n")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        draft = arguments.out / f".results.{os.getpid()}"
        draft.write_text(json.dumps(results, ensure_ascii=False, indent=2), encoding="utf-8")
        draft.replace(arguments.out / "results.json")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from engine.exporting import export

    def tell(message: str, fraction: float | None) -> None:
        if arguments.json:
            print(json.dumps({"type": "status", "message": message, "fraction": fraction}), flush=True)
        elif not fraction:
            print(message, file=sys.stderr)

    place = export(
        arguments.model,
        arguments.adapter,
        arguments.form,
        arguments.out,
        precision=arguments.precision,
        task=arguments.task,
        tell=tell,
    )
    size = sum(path.stat().st_size for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file())
    if arguments.json:
        print(json.dumps({"type": "done", "path": str(place), "bytes": size}, ensure_ascii=False), flush=True)
    else:
        print(f"{place} ({size:,} bytes)")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from engine.memory import doctor

    if arguments.run is not None:
        return _diagnose(arguments.run, arguments.json)
    if arguments.fit is None:
        if arguments.budget or arguments.device:
            raise ConfigError("--budget and --device are about a job.", "Name it: --fit JOB.yaml.")
        found = doctor.machine()
    else:
        found = doctor.fit(arguments.fit, arguments.budget, arguments.device)
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False), flush=True)
    else:
        print("\n".join(doctor.lines(found)))
    return 0


def _diagnose(folder: Path, as_json: bool) -> int:
    """What a run's curve says, a line each, and what to change."""
    from engine.diagnosis import diagnose, read
    from engine.train.job import value_of

    spec, course = read(folder)
    found = diagnose(spec, course)
    if not found and not as_json:
        print("Nothing stands out, or it is too early to say.")
    for finding in found:
        if as_json:
            event = {"type": "finding", "code": finding.code, "severity": finding.severity, "words": finding.words()}
            print(json.dumps({**event, "changes": dict(finding.changes)}, ensure_ascii=False), flush=True)
            continue
        print(f"{finding.severity:<5} {finding.words()}")
        for key, value in finding.changes.items():
            print(f"      {key}: {value_of(spec, key)} -> {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
