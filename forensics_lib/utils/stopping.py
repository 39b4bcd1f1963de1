"""SIGTERM and Ctrl-C as requests to stop at the next good moment."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the block the first SIGTERM or Ctrl-C is only noted, and the function given tells of it; a second one ends.

    In threads other than the main one, where Python takes no signals, nothing is noted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    noted: list[int] = []
    owner = os.getpid()

    def note(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # Ctrl-C reaches loader processes too; the one that started them ends them
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
