"""Distributed runs: several processes on one run, started by torchrun or by the parameter ``processes``.

Every process calls the same functions as a notebook does.  They share batches and images among themselves, the main
process (rank 0) writes the results, and all see one file system.  In a single process the functions here do nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from forensics_lib.utils.cores import usable_cores
from forensics_lib.utils.files import is_main

PATIENCE = timedelta(days=1)  # timeout of collectives: one process may make twins for hours; torchrun ends all when one dies
T = TypeVar("T")
TORCHRUN_ENDS = re.compile(r"[WE]\d{4} .*(closing signal|failed \(exitcode|Received \d+ death signal)")
LAUNCHED = "FORENSICS_LAUNCHED"  # set in processes started by ``launch``


class WorkerError(RuntimeError):
    """A process of the group failed; the message holds the last lines of the group's log."""


def join_group() -> None:
    """Join the process group if torchrun started this process; a node's cores and GPUs are divided among its processes.

    Only the main process prints.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.set_num_threads(max(1, usable_cores() // local_processes()))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    if not is_main():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (until the process ends)


def leave_group() -> None:
    """Wait for the other processes and end the group, if there is one."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes (world size)."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_processes() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def wait_for_all() -> None:
    """Barrier: wait until every process arrives."""
    if dist.is_initialized():
        dist.barrier()


def all_gather(value: Any) -> list[Any]:
    """The ``value`` of every process, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(*values: int) -> list[int]:
    """The sum of each value over all processes."""
    if not dist.is_initialized():
        return list(values)
    numbers = torch.tensor(values)
    dist.all_reduce(numbers)
    return numbers.tolist()


def broadcast_weights(model: nn.Module) -> None:
    """Copy the main process's weights and buffers to all processes."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def main_process_first(make: Callable[[], T]) -> T:
    """Call ``make()`` in the main process, then in the others, which find its results on disk."""
    if not is_main():
        wait_for_all()
    made = make()
    if is_main():
        wait_for_all()
    return made


def replicated(model: nn.Module, find_unused: bool) -> nn.Module:
    """Wrap ``model`` so that gradients are averaged over the processes; the model itself if there is only one.

    ``find_unused`` costs time in each batch; parameters that may get no gradient need it.
    """
    if not dist.is_initialized():
        return model
    model = model.to(memory_format=torch.channels_last)  # before: gradient buckets take the layout of the weights
    device = next(model.parameters()).device
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=find_unused)


def launch(processes: int, *arguments: str) -> None:
    """Run ``python -m forensics_lib`` with ``arguments`` in ``processes`` local processes, and print their output.

    Raises ``WorkerError`` if one of them fails; the message of ``KeyboardInterrupt`` tells what was saved.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    process = subprocess.Popen(
        [*command, "-m", "forensics_lib", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {LAUNCHED: "1", "FORENSICS_HEADLESS": "1", "PYTHONUNBUFFERED": "1"},
        process_group=0,  # Ctrl-C reaches only this process, which then signals torchrun once
    )
    said: deque[str] = deque(maxlen=30)  # last lines of the processes, without torchrun's long report of ending them
    try:
        ended = False
        for line in process.stdout or ():
            ended = ended or bool(TORCHRUN_ENDS.match(line))
            if not ended:
                print(line, end="", flush=True)
                said.append(line)
    except KeyboardInterrupt:
        process.terminate()
        rest, _ = process.communicate()
        raise KeyboardInterrupt(next((line for line in rest.splitlines() if line.startswith("stopped")), "")) from None
    finally:
        if process.poll() is None:
            process.terminate()
        status = process.wait()
    if status:
        raise WorkerError(f"one of {processes} processes failed; their last output:\n{''.join(said)}")


def should_launch(processes: int) -> bool:
    """Whether to launch processes: more than one is wanted, and this is not one of them."""
    return processes > 1 and world() == 1 and not launched()


def launched() -> bool:
    """Whether ``launch`` started this process."""
    return LAUNCHED in os.environ
