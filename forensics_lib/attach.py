"""One process trains or predicts a task of a run at a time; whoever asks for the same meanwhile waits and takes it up.

So a notebook whose browser was closed, or another one, shows the epochs of a training that still runs instead of starting a
second one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from forensics_lib.distributed import launched, wait_for_all
from forensics_lib.files import is_main
from forensics_lib.runs import Run

LOOK = 1.0  # seconds between two looks at the other's epochs


@contextmanager
def one_at_a_time(path: Path, held: str) -> Iterator[None]:
    """Within the block no other process is in a block of the same lock file ``path``; ``held`` is printed while one is.

    The lock is the system's: it ends with the process that holds it, however that ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    if not _acquired(lock):
        print(f"{held} (interrupting this wait leaves it alone)", flush=True)
        lock.acquire(poll_interval=LOOK)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def only_trainer(run: Run, task: str, epochs: Callable[[], list[str]]) -> Iterator[None]:
    """Within the block no other process trains this task of this run; while one does, its ``epochs`` are printed.

    ``epochs`` gives a line for each epoch that ``metrics.jsonl`` holds.  Interrupting the wait leaves the other alone.  The
    lock is the system's: it ends with the process that holds it, however that ends.
    """
    path = run.folder / "checkpoints" / f"task{task}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    if is_main():
        _acquire(lock, f"Task {task} of run {run.name}", epochs)
    wait_for_all()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def only_inference(run: Run, task: str) -> Iterator[None]:
    """Within the block no other process, or group of them, predicts the test images of this task of this run."""
    held = f"Task {task} of run {run.name} is being predicted by another process: waiting for it"
    with ExitStack() as stack:
        if is_main() and not launched():  # who launched others holds the lock for them
            stack.enter_context(one_at_a_time(run.folder / "shards" / f"task{task}.lock", held))
        wait_for_all()
        yield


def _acquire(lock: FileLock, what: str, epochs: Callable[[], list[str]]) -> None:
    if _acquired(lock):
        return
    print(f"{what} is being trained by another process (interrupting this wait leaves it alone):", flush=True)
    shown = 0
    while not _acquired(lock):
        lines = epochs()
        shown = 0 if len(lines) < shown else shown  # a new training's first epoch took the place of another's
        for line in lines[shown:]:
            print(line, flush=True)
        shown = len(lines)
        time.sleep(LOOK)


def _acquired(lock: FileLock) -> bool:
    with suppress(Timeout):
        lock.acquire(timeout=0)
    return lock.is_locked
