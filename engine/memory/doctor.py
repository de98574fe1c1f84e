"""`python -m engine doctor`: what this machine has, and whether a job fits it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.memory.machine import available, describe
from engine.memory.predicting import Job, Remedy
from engine.memory.prediction import Prediction, fits, parse_size, size
from engine.train.job import JobSpec

_SAID = {
    "fits": "It fits.",
    "tight": "It fits, but takes 85 % or more of the budget: close other programs.",
    "exceeds": "It does not fit.",
}


def machine() -> dict[str, Any]:
    """The machine, as `describe` has it."""
    return {"type": "machine", **describe()}


def fit(path: Path, budget: str | None, device: str | None) -> dict[str, Any]:
    """The prediction of a job file, the verdict, the largest batch, and a remedy where the job does not fit.

    Args:
        path: the job. budget: such as `8GB`; None: what is free now. device: `cpu`, `cuda`; None: as training.

    Raises:
        PredictionError, EngineError: as `engine.memory.predict`.
    """
    from engine.models.loading import default_device

    spec = JobSpec.from_file(path)
    place = device or ("cuda" if default_device() == "cuda" else "cpu")
    limit = parse_size(budget) if budget is not None else available(place)
    job = Job(spec, place)
    prediction = job.predict()
    verdict = fits(prediction, limit)
    found: Remedy | None = job.remedy(limit) if verdict == "exceeds" else None
    return {
        "type": "fit",
        "verdict": verdict,
        "budget": limit,
        "prediction": prediction.to_dict(),
        "largest_batch": job.largest_batch(limit),
        "remedy": found and {"changes": dict(found.changes), "words": found.words(), "peak": found.prediction.peak},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """`machine()` or `fit()` for people."""
    return _machine_lines(found) if found["type"] == "machine" else _fit_lines(found)


def _fit_lines(found: dict[str, Any]) -> list[str]:
    kept = {key: value for key, value in found["prediction"].items() if key not in ("total", "peak")}
    said = [*Prediction(**kept).lines(), f"{'budget':<28}{size(found['budget']):>12}", _SAID[found["verdict"]]]
    if found["largest_batch"]:
        said.append(f"The largest batch that fits: {found['largest_batch']}.")
    if found["remedy"]:
        said.append(f"This fits: {found['remedy']['words']} (peak {size(found['remedy']['peak'])}).")
    elif found["verdict"] == "exceeds":
        said.append("No smaller batch, checkpointing or 4-bit base makes it fit: take a smaller model or shorter rows.")
    return said


def _machine_lines(found: dict[str, Any]) -> list[str]:
    hint = "bf16 is faster here" if found["precision"] == "bf16" else "fp32 is as fast as bf16 here, or faster"
    said = [
        f"system      {found['system']}, Python {found['python']}",
        f"processor   {found['processor'] or 'unknown'}",
        f"cores       {found['cores']} usable of {found['cpus']} CPUs; training takes {found['threads']} threads",
        f"memory      {size(found['memory'])}, {size(found['available'])} free",
        f"device      {found['device']}, precision auto means {found['precision']} ({hint})",
    ]
    said += [f"GPU         {gpu['name']}, {size(gpu['memory'])}" for gpu in found["gpus"]] or ["GPU         none"]
    said.append("packages    " + ", ".join(f"{name} {version}" for name, version in found["packages"].items()))
    return said
