"""The number of usable CPU cores, and a process pool of that size."""

from __future__ import annotations

import os
from concurrent.futures import Executor

from loky import cpu_count, get_reusable_executor


def usable_cores() -> int:
    """The number of CPU cores within this process's affinity, container quota and SLURM allocation.

    ``OMP_NUM_THREADS`` is ignored: torchrun sets it to 1 in all of its processes, whatever their share of the cores.
    """
    allotted = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or ""
    return max(1, min(cpu_count(), int(allotted))) if allotted.isdecimal() else cpu_count()


def processes() -> Executor:
    """A pool with one process per usable core, started on first use; idle processes exit after some seconds."""
    return get_reusable_executor(max_workers=usable_cores())
