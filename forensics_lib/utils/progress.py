"""Progress display for everything that takes more than two seconds.

A bar in a terminal or in JupyterLab (as text, since a saved notebook would keep a dead widget); a line every few seconds
if output goes to a file or a pipe, or ``FORENSICS_HEADLESS`` is set.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_SECONDS = 10.0  # at most one line in this time without a terminal


class progress(Generic[T]):
    """Iterate over ``items`` and show position, speed and remaining time.

    ``note(text)`` adds a short text (a loss, a score) to the display.
    """

    def __init__(self, items: Iterable[T], title: str, total: int | None = None) -> None:
        self.items, self.title, self.text = items, title, ""
        self.total = total if total is not None else len(items)  # type: ignore[arg-type]
        self.bar: tqdm | None = None

    def note(self, text: str) -> None:
        self.text = text
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def __iter__(self) -> Iterator[T]:
        watched = sys.stdout.isatty() or type(sys.stdout).__module__.startswith("ipykernel")
        if watched and not headless():
            self.bar = tqdm(self.items, self.title, self.total, leave=False, file=sys.stdout)
            yield from self.bar
        else:
            yield from self._lines()

    def _lines(self) -> Iterator[T]:
        start = last = time.monotonic()
        for done, item in enumerate(self.items):
            now = time.monotonic()
            if done and now - last >= LINE_SECONDS:
                last = now
                left = (now - start) / done * max(self.total - done, 0)
                text = f", {self.text}" if self.text else ""
                print(f"{self.title}: {done}/{self.total}, {left:.0f} s left{text}", flush=True)
            yield item


def headless() -> bool:
    """Whether ``FORENSICS_HEADLESS`` is set: nobody watches, and widgets cannot work."""
    return bool(os.environ.get("FORENSICS_HEADLESS"))
