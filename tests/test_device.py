import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, picture, save
from torch.torch_version import TorchVersion

from forensics_lib import device as module
from forensics_lib.device import (
    COMPILES_BACKWARD,
    CompiledForBatches,
    DeviceLostError,
    DeviceMemoryError,
    choose_machine,
    compile_where_it_pays,
    compiled_for_training,
    lost_device_is_told,
)
from forensics_lib.inference.predict import predict_mask, predict_probabilities
from forensics_lib.models.combined import CombinedModel
from forensics_lib.params import Params
from forensics_lib.utils.cores import usable_cores

PARAMS = Params(**TINY | {"crop_size": 64, "tile_size": 64})


def test_batches_of_inference_follow_from_the_size_alone():
    machine = choose_machine(PARAMS)
    assert [machine.images_at_once(side**2) for side in (112, 224, 512)] == [32, 8, 1]
    assert choose_machine(PARAMS.model_copy(update={"batch_size": 1})).images_at_once(224**2) == 8


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="device: cuda, but PyTorch sees none here"):
        choose_machine(PARAMS.model_copy(update={"device": "cuda"}))


def test_a_gpu_computes_deterministically_where_that_is_asked_for(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is as before after the test
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    params = PARAMS.model_copy(update={"device": "cuda", "precision": "fp32", "deterministic": True})
    try:
        machine = choose_machine(params)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        assert "cuda (a GPU), fp32, deterministic" in str(machine)
    finally:
        choose_machine(params.model_copy(update={"deterministic": False}))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def large_machine(monkeypatch):
    """A machine of 64 cores without limits, as far as Python and its variables tell."""
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr("loky.backend.context._cpu_count_cgroup", lambda cores: cores)
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "LOKY_MAX_CPU_COUNT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(before)


def test_cores_are_shared_by_the_processes_of_a_machine(large_machine):
    large_machine.setenv("SLURM_CPUS_PER_TASK", "12")
    params = PARAMS.model_copy(update={"workers": "auto"})
    assert choose_machine(params).workers == 12
    large_machine.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_machine(params).workers == 3


@pytest.mark.parametrize(
    ("variables", "affinity", "quota", "cores"),
    [
        ({}, 64, 64, 64),
        ({}, 3, 64, 3),
        ({}, 64, 5, 5),
        ({"SLURM_CPUS_PER_TASK": "6", "SLURM_CPUS_ON_NODE": "48"}, 64, 64, 6),
        ({"SLURM_CPUS_ON_NODE": "8"}, 64, 64, 8),
        ({"SLURM_CPUS_PER_TASK": "128"}, 64, 64, 64),
        ({"SLURM_CPUS_PER_TASK": "6"}, 2, 64, 2),
        ({"SLURM_CPUS_PER_TASK": "8", "LOCAL_WORLD_SIZE": "2"}, 64, 6, 6),
        ({"SLURM_CPUS_PER_TASK": ""}, 64, 64, 64),
        ({"OMP_NUM_THREADS": "1"}, 64, 64, 64),
    ],
)
def test_only_allotted_cores_are_used(variables, affinity, quota, cores, large_machine):
    large_machine.setattr("os.sched_getaffinity", lambda process: set(range(affinity)), raising=False)
    large_machine.setattr("loky.backend.context._cpu_count_cgroup", lambda cores: quota)
    for name, value in variables.items():
        large_machine.setenv(name, value)
    assert usable_cores() == cores
    share = cores // int(variables.get("LOCAL_WORLD_SIZE", "1"))
    assert choose_machine(PARAMS.model_copy(update={"workers": "auto"})).workers == min(share, 16)


def test_no_more_threads_than_allotted_cores(large_machine):
    """Outside of SLURM's and a container's limits PyTorch takes one thread per core of the whole machine."""
    torch.set_num_threads(3)
    choose_machine(PARAMS)
    assert torch.get_num_threads() == 3, "fewer threads than cores are somebody's wish"
    large_machine.setenv("SLURM_CPUS_PER_TASK", "2")
    choose_machine(PARAMS)
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(not shutil.which("taskset"), reason="no taskset here")
def test_taskset_limits_a_real_process():
    core = min(os.sched_getaffinity(0))
    program = "from forensics_lib.utils.cores import usable_cores; print(usable_cores())"
    command = [shutil.which("taskset"), "-c", str(core), sys.executable, "-c", program]
    assert subprocess.check_output(command, text=True).strip() == "1"


def test_little_work_is_not_compiled_for():
    model = CombinedModel("A", "test_convnext")
    assert not compile_where_it_pays(model, pixels=1e6)
    assert next(model.parameters()).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize(("task", "precision"), [("A", "fp32"), ("B", "bf16")])
def test_the_fast_path_agrees_with_plain_fp32(task, precision, tmp_path, rng, monkeypatch):
    """Mixed precision, channels last, packed batches and compilation change probabilities by less than 0.01, masks by 0.02.

    The network has one block in each stage: fewer are compiled sooner.
    """
    rows = pd.DataFrame({"path": [str(save(tmp_path / f"{i}.png", picture(rng, 90 + i, 150))) for i in range(6)]})
    torch.manual_seed(0)
    network = CombinedModel(task, "test_convnext2", decoder_channels=16, levels="mask" if task == "B" else "tokens").eval()

    def answers() -> tuple[np.ndarray, np.ndarray]:
        if task == "A":
            return np.array([found.prob for found in predict_probabilities(network, rows, PARAMS, machine)]), np.zeros(1)
        image = picture(np.random.default_rng(1), 130, 170)
        prob, mask = predict_mask(network.to(memory_format=torch.channels_last), image, PARAMS, machine)
        return np.array([prob]), mask.astype(float)

    machine = choose_machine(PARAMS.model_copy(update={"precision": "fp32"}))
    plain, names = answers(), set(network.state_dict())
    machine = choose_machine(PARAMS.model_copy(update={"precision": precision}))
    monkeypatch.setattr(module, "COMPILED_FROM", {"cpu": 0})
    assert compile_where_it_pays(network, pixels=1)
    monkeypatch.setattr(module.Machine, "images_at_once", lambda self, pixels: 4)
    fast = answers()
    assert np.abs(fast[0] - plain[0]).max() < 0.01
    assert np.abs(fast[1] - plain[1]).max() < 0.02
    assert set(network.state_dict()) == names, "checkpoints keep their names"


def partly_frozen(task: str = "A", stages: int | str = 1) -> CombinedModel:
    torch.manual_seed(0)
    model = CombinedModel(task, "test_convnext", decoder_channels=16).to(memory_format=torch.channels_last)
    model.freeze_backbone(stages)
    return model.train()


@pytest.mark.parametrize(
    ("task", "stages", "pixels", "deterministic", "compiled"),
    [
        ("A", 1, 2e9, False, True),
        ("A", 0, 2e9, False, True),
        ("A", 1, 5e8, False, False),
        ("A", "all", 2e9, False, False),
        ("B", 1, 2e9, False, False),
        ("A", 1, 2e9, True, False),
    ],
)
def test_a_model_learns_compiled_where_that_pays(task, stages, pixels, deterministic, compiled, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    model = partly_frozen(task, stages)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.14.1+cpu"))
    view = compiled_for_training(model, task, 4, pixels)
    assert isinstance(view, CompiledForBatches) if compiled else view is model
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    assert compiled_for_training(model, task, 4, pixels) is model


def loss_and_gradients(model: CombinedModel, view: torch.nn.Module, count: int) -> tuple[torch.Tensor, ...]:
    images = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))
    loss = torch.nn.functional.cross_entropy(view(images).logits, torch.arange(count) % 2)
    return loss, *torch.autograd.grad(loss, [parameter for parameter in model.parameters() if parameter.requires_grad])


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < COMPILES_BACKWARD, reason=f"PyTorch {torch.__version__} may fail to compile this")
def test_a_compiled_model_learns_what_it_would_learn_as_it_is():
    model = partly_frozen()
    view = compiled_for_training(model, "A", 4, pixels=2e9)
    plain, compiled = loss_and_gradients(model, model, 4), loss_and_gradients(model, view, 4)
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
    plain, uncompiled = loss_and_gradients(model, model, 3), loss_and_gradients(model, view, 3)
    assert all(map(torch.equal, uncompiled, plain)), "an epoch's last batch, which is smaller, is not compiled for"


def test_a_device_that_was_never_measured_compiles_nothing():
    model = torch.nn.Linear(2, 2, device="meta")
    assert not compile_where_it_pays(model, pixels=1e30)
    assert compiled_for_training(model, "A", size=4, pixels=1e30) is model


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA error: no CUDA-capable device is detected"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (DeviceMemoryError("it does not fit"), False),
    ],
    ids=lambda value: str(value).splitlines()[0],
)
def test_only_a_failure_of_the_gpu_is_told_as_such(error, lost):
    with pytest.raises(DeviceLostError if lost else type(error)) as caught, lost_device_is_told(), lost_device_is_told():
        raise error
    assert str(error).splitlines()[0] in str(caught.value)
    assert ("the same command goes on" in str(caught.value)) == lost
