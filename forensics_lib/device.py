"""What this machine computes with: device, precision and loader processes, chosen once and printed."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from forensics_lib.params import Params
from forensics_lib.utils.cores import usable_cores
from forensics_lib.utils.processes import local_processes

# From where on compiling pays, which takes as long for a GPU, though that is about a hundred times as fast.
COMPILED_FROM = {"cpu": 1e16, "cuda": 1e18}  # inference, pixels times parameters: about 2,300 crops with ConvNeXt-B on a CPU
COMPILES_BACKWARD = (2, 12)  # PyTorch's version from which what it compiles for CPUs learns; older ones fail with some models
LEARNS_COMPILED_FROM = {"cpu": 1e9, "cuda": 1e11}  # training, pixels: about 20,000 crops on a CPU


@dataclass(frozen=True)
class Machine:
    """Where a run computes."""

    device: torch.device
    bf16: bool
    workers: int

    def autocast(self) -> AbstractContextManager:
        """Mixed precision around a forward pass, or nothing where it is not used."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def to_device(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images ``(N, 3, H, W)`` to floats in [0, 1] on the device, channels last."""
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return images.float() / 255

    def images_at_once(self, pixels: int) -> int:
        """How many images of ``pixels`` pixels each go through a model together where it does not learn."""
        return max(1, (128 if self.device.type == "cuda" else 8) * 224**2 // pixels)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{torch.get_num_threads()} threads"
        precision = "bf16" if self.bf16 else "fp32"
        deterministic = ", deterministic" if torch.are_deterministic_algorithms_enabled() else ""
        return f"{self.device.type} ({name}), {precision}{deterministic}, {self.workers} loader processes"


def choose_machine(params: Params) -> Machine:
    """Resolve the ``auto`` settings, take no more threads than usable cores, and have a GPU compute as ``deterministic`` says.

    Raises ``ValueError`` where a GPU is asked for and there is none.
    """
    if params.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda, but PyTorch sees no CUDA GPU here; set device: auto or cpu")
    cuda = params.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if cuda:
        compute_deterministically(params.deterministic)
    bf16 = params.precision == "bf16" or (params.precision == "auto" and _computes_bf16_fast(device))
    cores = max(1, usable_cores() // local_processes())
    if torch.get_num_threads() > cores:  # PyTorch does not know a container's quota
        torch.set_num_threads(cores)
    workers = min(cores, 16) if params.workers == "auto" else params.workers
    return Machine(device, bf16, workers)


def compute_deterministically(wanted: bool) -> None:
    """Have a GPU use algorithms that give the same results each time, or the fastest; PyTorch warns where it has none such."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    torch.use_deterministic_algorithms(wanted, warn_only=True)


def compile_where_it_pays(model: nn.Module, pixels: float) -> bool:
    """Compile a model in place for inference on that many pixels, if these are more than compiling costs; says which.

    Compiling takes half a minute and halves the time of a ConvNeXt on CPU (docs/performance.md).  Weights are taken for
    constants, so the model must not learn any more.  Where there is no compiler, the model runs as it is.
    """
    work = pixels * sum(parameter.numel() for parameter in model.parameters())
    if work < COMPILED_FROM[_device_of(model)]:
        return False
    from torch import _dynamo, _inductor  # take seconds to import

    print("compiling the model for inference (half a minute)", flush=True)
    _inductor.config.freezing = True
    _dynamo.config.suppress_errors = True
    model.requires_grad_(False).compile(dynamic=False)
    return True


class CompiledForBatches(nn.Module):
    """A view of a model that learns, compiled for batches of ``size`` images; others go through the model as it is.

    The model itself stays uncompiled, as what is validated and saved.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.compiled, self.size = model, torch.compile(model, dynamic=False), size

    def forward(self, images: torch.Tensor) -> Any:
        return (self.compiled if len(images) == self.size else self.model)(images)


def compiled_for_training(model: nn.Module, task: str, size: int, pixels: float) -> nn.Module:
    """A model's view for learning from batches of ``size`` images, compiled where ``pixels`` of training pay for that.

    Compiling takes up to a minute.  On a CPU it speeds up models for Task A of which a part is frozen, by 5 to 50%, and
    no others (``bench_speed.py run --only train``).  Never with ``deterministic``: what is compiled may differ from
    time to time.
    """
    device = _device_of(model)
    partly = task == "A" and not all(parameter.requires_grad for parameter in model.parameters())
    faster = device == "cuda" or (partly and torch.__version__ >= COMPILES_BACKWARD)
    if pixels < LEARNS_COMPILED_FROM[device] or not faster or torch.are_deterministic_algorithms_enabled():
        return model
    from torch import _dynamo  # takes seconds to import

    print("compiling the model for training (up to a minute)", flush=True)
    _dynamo.config.suppress_errors = True
    return CompiledForBatches(model, size)


def _device_of(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _computes_bf16_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
