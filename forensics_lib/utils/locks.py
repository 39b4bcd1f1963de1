"""Locks between processes, and requests to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

LOOK = 1.0  # seconds between two polls of another process's lock and output


@contextmanager
def exclusive(path: Path, held: str, lines: Callable[[], list[str]] = list) -> Iterator[None]:
    """Hold the exclusive lock of the lock file ``path``.

    While another process holds it, print ``held``, then each new line that ``lines`` returns.  Interrupting the wait does
    not affect the other process.  The operating system releases the lock when its process ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    if not _acquired(lock):
        print(f"{held} (interrupting this wait leaves it alone)", flush=True)
        shown = 0
        while not _acquired(lock):
            found = lines()
            shown = 0 if len(found) < shown else shown  # the other process restarted
            for line in found[shown:]:
                print(line, flush=True)
            shown = len(found)
            time.sleep(LOOK)
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: FileLock) -> bool:
    with suppress(Timeout):
        lock.acquire(timeout=0)
    return lock.is_locked


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Catch the first SIGTERM or Ctrl-C: the yielded function then returns True; a second signal interrupts.

    Outside the main thread, where Python receives no signals, nothing is caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    noted: list[int] = []
    owner = os.getpid()

    def note(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # Ctrl-C reaches loader processes too; their parent ends them
            return
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        print(f"{signal.Signals(number).name}: stopping after this batch; once more to stop at once", flush=True)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
