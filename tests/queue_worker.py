"""A worker for the queue's tests: a real process, real commands, no model. The run's name says how it behaves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from engine.paths import studio_home
from studio import states
from studio.store import Store
from studio.worker import StoreControl, StoreSink, claim

STEPS = 400


def main() -> int:
    store = Store(studio_home())
    run_id = sys.argv[1]
    manner = store.run(run_id)["name"]
    if manner == "breaks":
        return 3
    if not claim(store, run_id):
        return 4
    sink = StoreSink(store, run_id)
    control = StoreControl(store, sink)
    if manner == "stubborn":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if manner == "slow-start":
        time.sleep(300)
    folder = studio_home() / "runs" / run_id / "checkpoints"
    first = 1
    if store.run(run_id)["resume"]:
        first = max(int(path.name[5:]) for path in folder.iterdir()) + 1
    sink.emit({"type": "start", "total_steps": STEPS, "first_step": first})
    steps = 5 if manner == "short" else STEPS
    for step in range(first, steps + 1):
        time.sleep(0.02)
        sink.emit({"type": "step", "step": step, "loss": 10.0 / step})
        command = None if manner == "stubborn" else control.poll()
        if command or step % 10 == 0:
            (folder / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)
        if command in ("stop", "pause"):
            final = {"stop": states.STOPPED, "pause": states.PAUSED}[command]
            sink.emit({"type": final, "step": step})
            store.update_run(run_id, state=final, ended=time.time())
            return 0
    sink.emit({"type": "done", "step": steps})
    store.update_run(run_id, state=states.DONE, ended=time.time())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
