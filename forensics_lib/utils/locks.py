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

from forensics_lib.run import Run
from forensics_lib.utils.files import is_main
from forensics_lib.utils.processes import launched, wait_for_all

LOOK = 1.0  # seconds between two looks at what another process does


@contextmanager
def exclusive(path: Path, held: str, lines: Callable[[], list[str]] = list) -> Iterator[None]:
    """Within the block no other process is in a block of the same lock file ``path``.

    While another one is, ``held`` is printed, and then whatever ``lines`` gives that was not printed yet.  Interrupting the
    wait leaves the other process alone.  The operating system holds the lock: it ends with its process, however that ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    if not _acquired(lock):
        print(f"{held} (interrupting this wait leaves it alone)", flush=True)
        shown = 0
        while not _acquired(lock):
            found = lines()
            shown = 0 if len(found) < shown else shown  # the other process began anew
            for line in found[shown:]:
                print(line, flush=True)
            shown = len(found)
            time.sleep(LOOK)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def only_trainer(run: Run, task: str, epochs: Callable[[], list[str]]) -> Iterator[None]:
    """Within the block no other process trains this task of this run; while one does, its ``epochs`` are printed.

    ``epochs`` gives a line for each epoch that ``metrics.jsonl`` holds.
    """
    held = f"Task {task} of run {run.name} is being trained by another process: its epochs follow"
    with ExitStack() as stack:
        if is_main():
            stack.enter_context(exclusive(run.folder / "checkpoints" / f"task{task}.lock", held, epochs))
        wait_for_all()
        yield


@contextmanager
def only_inference(run: Run, task: str) -> Iterator[None]:
    """Within the block no other process, or group of them, predicts the test images of this task of this run."""
    held = f"Task {task} of run {run.name} is being predicted by another process: waiting for it"
    with ExitStack() as stack:
        if is_main() and not launched():  # who launched others holds the lock for them
            stack.enter_context(exclusive(run.folder / "shards" / f"task{task}.lock", held))
        wait_for_all()
        yield


def _acquired(lock: FileLock) -> bool:
    with suppress(Timeout):
        lock.acquire(timeout=0)
    return lock.is_locked
