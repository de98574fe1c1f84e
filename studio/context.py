"""What every page needs, made once when the server starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.paths import studio_home
from studio.inference import Inference
from studio.jobs import Jobs
from studio.scoring import Scoring
from studio.store import Store


@dataclass(frozen=True)
class Studio:
    """One home folder, opened.

    Attributes:
        home: the folder for runs, data, models and the database.
        store: what is remembered.
        jobs: the queue and its runs.
        inference: the process that holds a base.
        scoring: evaluations of runs, and what came of them.
    """

    home: Path
    store: Store
    jobs: Jobs
    inference: Inference
    scoring: Scoring

    @classmethod
    def open(cls, home: Path | None = None) -> Studio:
        """Open a home folder without starting its queue."""
        home = home or studio_home()
        store = Store(home)
        jobs = Jobs(store, home)
        return cls(home, store, jobs, Inference(home), Scoring(store, jobs))

    def close(self) -> None:
        """End what belongs to this server: the queue's thread and the inference process. Runs and evaluations go on."""
        self.jobs.close()
        self.inference.close()
        self.store.close()
