"""The states of a run, and which of them mean what. Nothing else spells a state."""

from __future__ import annotations

from studio.i18n import N_

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
    QUEUED: N_("Waiting in the queue"),
    STARTING: N_("Starting"),
    RUNNING: N_("Training"),
    PAUSING: N_("Pausing after this step"),
    PAUSED: N_("Paused"),
    STOPPING: N_("Stopping after this step"),
    STOPPED: N_("Stopped early"),
    DONE: N_("Done"),
    FAILED: N_("Failed"),
    LOST: N_("Lost: the process ended without a word"),
}
"""What a state is, for `t`."""
