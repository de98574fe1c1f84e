"""What every page needs, made once when the server starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.paths import studio_home
from studio.inference import Inference
from studio.jobs import Jobs
from studio.library import Library
from studio.machine import Machine, look
from studio.scoring import Scoring
from studio.store import Store
from studio.works import Works


@dataclass(frozen=True)
class Studio:
    """One home folder, opened.

    Attributes:
        home: the folder for runs, data, models and the database.
        store: what is remembered.
        jobs: the queue and its runs.
        inference: the process that holds a base.
        scoring: evaluations of runs, and what came of them.
        library: the adapters, and mixes of them.
        works: long work on adapters.
        machine: what this machine has.
    """

    home: Path
    store: Store
    jobs: Jobs
    inference: Inference
    scoring: Scoring
    library: Library
    works: Works
    machine: Machine

    @classmethod
    def open(cls, home: Path | None = None) -> Studio:
        """Open a home folder without starting its queue."""
        home = home or studio_home()
        store = Store(home)
        jobs = Jobs(store, home)
        library = Library(store, jobs)
        works = Works(store, home)
        return cls(home, store, jobs, Inference(home), Scoring(store, jobs), library, works, look())

    def close(self) -> None:
        """End what belongs to this server: the queue's thread and the inference process. Runs and evaluations go on."""
        self.jobs.close()
        self.inference.close()
        self.store.close()
