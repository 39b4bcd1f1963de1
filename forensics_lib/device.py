"""Device, precision, threads and loader processes of this machine, and when compiling a model pays."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from forensics_lib.params import Params
from forensics_lib.utils.cores import usable_cores
from forensics_lib.utils.processes import local_processes

# Work from which compiling pays; it takes as long for a GPU, which is about a hundred times as fast.  On other devices: never
COMPILED_FROM = {"cpu": 1e16, "cuda": 1e18}  # inference, pixels times parameters: about 2,300 crops with ConvNeXt-B on a CPU
COMPILES_BACKWARD = "2.12"  # first PyTorch that compiles backward passes on CPUs; older ones fail with some models
LEARNS_COMPILED_FROM = {"cpu": 1e9, "cuda": 1e11}  # training, pixels: about 20,000 crops on a CPU


class DeviceMemoryError(RuntimeError):
    """The device's memory does not suffice; the message says for what, and what to lower."""


class DeviceLostError(RuntimeError):
    """The GPU failed; the message says with what, what is kept, and how to go on."""


# Errors after which a process cannot use its GPU any more; PyTorch raises some of them as plain RuntimeError
LOST = re.compile(r"CUDA error|CUDNN_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)|CUBLAS_STATUS_EXECUTION_FAILED")


@contextmanager
def lost_device_is_told() -> Iterator[None]:
    """Within the block, or the function so decorated, a failure of the GPU is raised as ``DeviceLostError``."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DeviceLostError) or not (isinstance(error, torch.AcceleratorError) or LOST.search(str(error))):
            raise
        raise DeviceLostError(
            f"the GPU failed ({str(error).splitlines()[0]}), and this process cannot use it any more. Checkpoints up to the "
            "last saved epoch are whole, as are finished shards: the same command goes on from there, and the same cell after "
            "a restart of its kernel. If it fails again: nvidia-smi shows the GPU's state, and device: cpu does without it"
        ) from error


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """Device, precision and number of loader processes of a run."""

    device: torch.device
    precision: str  # fp32, bf16 or fp16: of what autocast computes in less than fp32
    workers: int

    def autocast(self) -> AbstractContextManager:
        """Context of a forward pass: mixed precision, if it is used."""
        return torch.autocast(self.device.type, HALVES.get(self.precision), enabled=self.precision in HALVES)

    def to_device(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images ``(N, 3, H, W)`` to float32 in [0, 1] on the device, channels last."""
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return images.float() / 255

    def images_at_once(self, pixels: int) -> int:
        """The batch size of inference on images of ``pixels`` pixels."""
        return max(1, (128 if self.device.type == "cuda" else 8) * 224**2 // pixels)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{torch.get_num_threads()} threads"
        deterministic = ", deterministic" if torch.are_deterministic_algorithms_enabled() else ""
        return f"{self.device.type} ({name}), {self.precision}{deterministic}, {self.workers} loader processes"


def choose_machine(params: Params) -> Machine:
    """Choose device, precision and number of loader processes, and limit threads to the usable cores.

    Raises ``ValueError`` for a device that PyTorch does not see here.
    """
    device = _device(params.device)
    if device.type == "cuda":
        compute_deterministically(params.deterministic)
    cores = max(1, usable_cores() // local_processes())
    if torch.get_num_threads() > cores:  # PyTorch does not know a container's quota
        torch.set_num_threads(cores)
    workers = min(cores, 16) if params.workers == "auto" else params.workers
    return Machine(device, _fast_precision(device) if params.precision == "auto" else params.precision, workers)


def memory_of(device: torch.device) -> str:
    """How much memory a GPU has and how much of it is free, in words."""
    if device.type != "cuda":
        return f"the memory of {device}"
    free, total = torch.cuda.mem_get_info(device)
    return f"{torch.cuda.get_device_name(device)} with {total / 2**30:.0f} GiB, of which {free / 2**30:.1f} are free now"


def _device(wanted: str) -> torch.device:
    """The device of this name; ``auto`` is a CUDA GPU or else the CPU.  ``mps`` (Apple) has never been tried."""
    seen = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = ("cuda" if seen["cuda"] else "cpu") if wanted == "auto" else wanted
    if not seen[name]:
        there = ", ".join(device for device, found in seen.items() if found)
        raise ValueError(f"device: {name}, but PyTorch sees none here; set device: auto, or one of {there}")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def _fast_precision(device: torch.device) -> str:
    """bf16, or fp16 on GPUs from before bf16 (compute capability 7.0 on), where it is fast, else fp32."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"
    fast = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return "bf16" if fast else "fp32"


def compute_deterministically(wanted: bool) -> None:
    """Make a GPU use deterministic algorithms, or the fastest; PyTorch warns if it has no deterministic one."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.set_float32_matmul_precision("highest" if wanted else "high")  # TF32, where the GPU has it
    torch.backends.cudnn.allow_tf32 = not wanted


def compile_where_it_pays(model: nn.Module, pixels: float) -> bool:
    """Compile a model in place for inference, if ``pixels`` are enough to outweigh compiling; returns whether it did.

    Compiling takes half a minute and halves the time of a ConvNeXt on CPU (docs/performance.md).  Weights become constants,
    so the model must not be trained any more.  Without a compiler the model runs uncompiled.
    """
    work = pixels * sum(parameter.numel() for parameter in model.parameters())
    if work < COMPILED_FROM.get(_device_of(model), math.inf):
        return False
    from torch import _dynamo, _inductor  # slow to import

    print("compiling the model for inference (half a minute)", flush=True)
    _inductor.config.freezing = True
    _dynamo.config.suppress_errors = True
    model.requires_grad_(False).compile(dynamic=False)
    return True


class CompiledForBatches(nn.Module):
    """Wrap a model in training: batches of ``size`` images use a compiled version, other batches the model itself.

    The model that is validated and saved stays uncompiled.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.compiled, self.size = model, torch.compile(model, dynamic=False), size

    def forward(self, images: torch.Tensor) -> Any:
        return (self.compiled if len(images) == self.size else self.model)(images)


def compiled_for_training(model: nn.Module, task: str, size: int, pixels: float) -> nn.Module:
    """The model, or a wrapper that is compiled for batches of ``size`` images if ``pixels`` of training outweigh compiling.

    Compiling takes up to a minute.  On a CPU it speeds up partly frozen models of Task A by 5 to 50%, and no others
    (``bench_speed.py run --only train``).  Never with ``deterministic``, since compiled results may vary.
    """
    device = _device_of(model)
    partly = task == "A" and not all(parameter.requires_grad for parameter in model.parameters())
    faster = device == "cuda" or (partly and torch.__version__ >= COMPILES_BACKWARD)
    if pixels < LEARNS_COMPILED_FROM.get(device, math.inf) or not faster or torch.are_deterministic_algorithms_enabled():
        return model
    from torch import _dynamo  # slow to import

    print("compiling the model for training (up to a minute)", flush=True)
    _dynamo.config.suppress_errors = True
    return CompiledForBatches(model, size)


def _device_of(model: nn.Module) -> str:
    return next(model.parameters()).device.type
