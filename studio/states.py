"""The states of a run, and which of them mean what. Nothing else spells a state."""

from __future__ import annotations

QUEUED = "queued"
STARTING = "starting"
RUNNING = "running"
PAUSING = "pausing"
PAUSED = "paused"
STOPPING = "stopping"
STOPPED = "stopped"
DONE = "done"
FAILED = "failed"
LOST = "lost"

ALL = (QUEUED, STARTING, RUNNING, PAUSING, PAUSED, STOPPING, STOPPED, DONE, FAILED, LOST)

ACTIVE = (STARTING, RUNNING, PAUSING, STOPPING)
"""A process belongs to the run."""

LIVE = (QUEUED, *ACTIVE)
"""The page has something to wait for."""

RESUMABLE = (PAUSED, STOPPED, FAILED, LOST)
"""No process, and a checkpoint may be there to go on from."""

FINISHED = (PAUSED, STOPPED, DONE, FAILED, LOST)
"""No process."""

WORDS = {
    QUEUED: "Waiting in the queue",
    STARTING: "Starting",
    RUNNING: "Training",
    PAUSING: "Pausing after this step",
    PAUSED: "Paused",
    STOPPING: "Stopping after this step",
    STOPPED: "Stopped early",
    DONE: "Done",
    FAILED: "Failed",
    LOST: "Lost: the process ended without a word",
}
