"""How many cores this process may use, and a pool of processes that uses them."""

from __future__ import annotations

import os
from concurrent.futures import Executor

from loky import cpu_count, get_reusable_executor


def usable_cores() -> int:
    """How many cores this process may use: at most what its affinity, its container's quota and SLURM's allocation allow.

    ``OMP_NUM_THREADS`` does not count: torchrun sets it to 1 for all of its processes, whatever they may use.
    """
    allotted = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or ""
    return max(1, min(cpu_count(), int(allotted))) if allotted.isdecimal() else cpu_count()


def processes() -> Executor:
    """One process per usable core, started when first needed; they end by themselves after some idle seconds."""
    return get_reusable_executor(max_workers=usable_cores())
