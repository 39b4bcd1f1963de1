"""The number of usable CPU cores, and a process pool of that size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import TypeVar

from loky import cpu_count, get_reusable_executor

T = TypeVar("T")
R = TypeVar("R")
WORTH = 8  # pieces of work from which on processes pay: they start in seconds, and a kernel that has some ends late


def usable_cores() -> int:
    """The number of CPU cores within this process's affinity, container quota and SLURM allocation.

    ``OMP_NUM_THREADS`` is ignored: torchrun sets it to 1 in all of its processes, whatever their share of the cores.
    """
    allotted = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or ""
    return max(1, min(cpu_count(), int(allotted))) if allotted.isdecimal() else cpu_count()


def processes() -> Executor:
    """A pool with one process per usable core, started on first use; idle processes exit after some seconds."""
    return get_reusable_executor(max_workers=usable_cores())


def spread(work: Callable[[T], R], pieces: list[T]) -> Iterator[R]:
    """The results of ``work`` on each piece, in order; of ``WORTH`` pieces or more by ``processes``."""
    return processes().map(work, pieces) if len(pieces) >= WORTH else map(work, pieces)
