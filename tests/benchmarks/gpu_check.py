"""Whether a GPU computes what a CPU does, trains both tasks, and how fast: at most eight minutes on one H100, no downloads.

    python tests/benchmarks/gpu_check.py [--device cuda] [--backbone convnext_base] [--steps 100] [--small]

Everything is done on the built-in sample, with random weights, by the library's own functions:

``train``   both tasks for about ``--steps`` updates: losses finite and falling, peak memory, images per second
``answers`` the trained models' probabilities and masks on the GPU against those of the CPU: at most 0.01 apart
``resume``  a training stopped within an epoch ends bit for bit as one that was not, with ``deterministic``
``speed``   forward and backward passes alone: images per second in each precision, compiled and not, the share of the card's
            own rate of matrix products, and what ``deterministic`` costs

``--small`` is the form for a test: a tiny backbone, few steps, nothing compiled, on any device.  The results are printed, and
written to ``build/gpu_check.json``.  The exit status is 1 where a check fails.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from forensics_lib.data.manifest import build_manifest, usable
from forensics_lib.device import HALVES, Machine, choose_machine, compute_deterministically
from forensics_lib.inference.predict import predict_masks, predict_probabilities
from forensics_lib.models.checkpoint import load_model, read_checkpoint
from forensics_lib.models.combined import CombinedModel, build_model
from forensics_lib.params import Params, load_params
from forensics_lib.run import Run
from forensics_lib.synthesis.sample import build_sample
from forensics_lib.training import epoch as epochs
from forensics_lib.training.loop import train
from forensics_lib.utils.files import project_root, write_json

FARTHEST = 0.01  # between a GPU's and a CPU's probabilities


def make_run(data: Path, options: argparse.Namespace, **changes: Any) -> Run:
    """A run on the sample that takes about ``--steps`` updates in step 2."""
    batch = 2 if options.small else 16
    updates = len(list((data / "dataset" / "train").rglob("*.jpg"))) // batch
    values = {
        "backbone": options.backbone,
        "frontend": "rgb",
        "device": options.device,
        "batch_size": batch,
        "epochs_head": 1,
        "epochs_finetune": max(2, round(options.steps / updates)),
        "lr_finetune": 1e-3 if options.small else 1e-4,
        "val_limit": 32,
        "crop_size": 32 if options.small else 224,
        "workers": 0 if options.small else "auto",
    }
    params = load_params("params/sample.yaml", values | changes)
    return Run(params, data)


def check_training(run: Run, task: str) -> dict[str, Any]:
    cuda = choose_machine(run.params).device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    history = train(run, task, build_manifest(run, task))
    losses = history.loc[history["step"] == "finetune", "train_loss"].to_numpy()
    facts = {"losses": losses.tolist(), "images_per_second": float(history["images_per_second"].iloc[-1])}
    facts["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return facts | {"passed": bool(np.isfinite(losses).all() and losses[-1] < losses[0])}


def check_answers(run: Run, task: str, images: int) -> dict[str, Any]:
    """The trained model's answers on the run's device, in each precision, against those of the CPU in fp32."""
    rows = usable(build_manifest(run, task), "val").head(images).reset_index(drop=True)
    reference = answers(run, task, rows, device="cpu", precision="fp32")
    facts: dict[str, Any] = {}
    for precision in ("fp32", "auto"):
        found = answers(run, task, rows, device=run.params.device, precision=precision)
        facts[precision] = max(float(np.abs(a - b).max()) for a, b in zip(found, reference, strict=True))
    return facts | {"passed": max(facts.values()) <= FARTHEST}


def answers(run: Run, task: str, rows: Any, **changes: Any) -> list[np.ndarray]:
    params = run.params.model_copy(update=changes)
    machine = choose_machine(params)
    model = load_model(run.finetuned_model(task), task)[0]
    if task == "A":
        return [np.array([found.prob for found in predict_probabilities(model, rows, params, machine)])]
    found = list(predict_masks(model, rows, params, machine))
    return [np.array([one.prob for one in found]), *(one.mask.astype(np.float32) for one in found if one.mask is not None)]


def check_resume(data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train twice with ``deterministic``, the second time stopped in the middle of an epoch; compare every weight."""
    changes = {"deterministic": True, "epochs_finetune": 2, "val_limit": 8}
    whole, stopped = (make_run(data, options, run_name=name, **changes) for name in ("whole", "stopped"))
    train(whole, "A", build_manifest(whole, "A"))
    loss, calls = epochs.batch_loss, []

    def stops_once(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    epochs.batch_loss = stops_once
    try:
        train(stopped, "A", build_manifest(stopped, "A"))
        raise RuntimeError("the training did not stop")
    except KeyboardInterrupt:
        print("stopped within an epoch, as wanted: going on")
    finally:
        epochs.batch_loss = loss
    train(stopped, "A", build_manifest(stopped, "A"))
    compute_deterministically(False)
    models = [read_checkpoint(run.finetuned_model("A"))["model"] for run in (whole, stopped)]
    return {"passed": all(torch.equal(models[0][name], models[1][name]) for name in models[0])}


def measure_speed(params: Params, images: int, seconds: float, compiled: bool) -> dict[str, Any]:
    """Images per second of passes alone, and their share of the rate of matrix products that the device reaches."""
    facts: dict[str, Any] = {}
    for precision in ("auto", "fp32"):
        machine = choose_machine(params.model_copy(update={"precision": precision}))
        kind = machine.precision
        peak = matrix_rate(machine, seconds)
        facts[f"{kind}: matrix products, TFLOP/s"] = peak / 1e12
        for task in "AB":
            model = build_model(params, task).to(machine.device, memory_format=torch.channels_last)
            batch = torch.randint(0, 256, (images, 3, params.crop_size, params.crop_size), dtype=torch.uint8)
            with FlopCounterMode(display=False) as counter, torch.no_grad(), machine.autocast():
                model.eval()(machine.to_device(batch[:1]))
            work = counter.get_total_flops()
            for name, way, passes in ways_of(model, batch, machine, compiled):
                rate = images / timed(way, machine, seconds)
                facts[f"{kind}: Task {task}, {name}, images/s"] = rate
                facts[f"{kind}: Task {task}, {name}, share of matrix products"] = rate * work * passes / peak
    return facts


def ways_of(
    model: CombinedModel, batch: torch.Tensor, machine: Machine, compiled: bool
) -> list[tuple[str, Callable[[], Any], int]]:
    """Ways to pass a batch: name, function, and how many forward passes its work amounts to."""
    labels = torch.arange(len(batch), device=machine.device) % 2

    def infer(network: Any) -> None:
        model.eval()
        with torch.inference_mode(), machine.autocast():
            network(machine.to_device(batch))

    def learn(network: Any) -> None:
        model.train()
        with machine.autocast():
            output = network(machine.to_device(batch))
        loss = F.cross_entropy(output.logits.float(), labels)
        if output.mask_logits is not None:
            loss = loss + output.mask_logits.float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    def deterministic() -> None:
        compute_deterministically(True)
        learn(model)
        compute_deterministically(False)

    ways = [
        ("inference", lambda: infer(model), 1),
        ("training", lambda: learn(model), 3),
    ]
    if compiled:
        fast = torch.compile(model, dynamic=False)
        ways += [("inference, compiled", lambda: infer(fast), 1), ("training, compiled", lambda: learn(fast), 3)]
    return ways + ([("training, deterministic", deterministic, 3)] if machine.device.type == "cuda" else [])


def timed(way: Callable[[], Any], machine: Machine, seconds: float) -> float:
    """Seconds per call, after three calls that do not count."""

    def wait() -> None:
        if machine.device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        way()
    wait()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        way()
        wait()
        calls += 1
    return (time.perf_counter() - started) / calls


def matrix_rate(machine: Machine, seconds: float) -> float:
    """FLOP/s of a large square matrix product in the machine's precision."""
    side = 8192 if machine.device.type == "cuda" else 1024
    kind = HALVES.get(machine.precision, torch.float32)
    a, b = (torch.randn(side, side, device=machine.device, dtype=kind) for _ in range(2))
    return 2 * side**3 / timed(lambda: a @ b, machine, seconds)


def checks(options: argparse.Namespace) -> dict[str, Any]:
    data = build_sample(Path(os.environ["FORENSICS_HOME"]) / "data" / "sample")
    run = make_run(data, options)
    facts: dict[str, Any] = {
        "machine": str(choose_machine(run.params)),
        "versions": f"python {sys.version.split()[0]}, torch {torch.__version__}, timm {timm.__version__}",
        "backbone": options.backbone,
    }
    for task in "AB":
        print(f"=== Task {task}", flush=True)
        facts[f"train {task}"] = check_training(run, task)
        facts[f"answers {task}"] = check_answers(run, task, 4 if options.small else 16)
    print("=== resume", flush=True)
    facts["resume"] = check_resume(data, options)
    print("=== speed", flush=True)
    facts["speed"] = measure_speed(
        run.params, 2 if options.small else 64, 0.1 if options.small else 3.0, compiled=not options.small
    )
    return facts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--backbone", default="convnext_base")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--small", action="store_true", help="tiny backbone, few steps: for tests")
    parser.add_argument("--out", type=Path, default=project_root() / "build" / "gpu_check.json")
    options = parser.parse_args(arguments)
    if options.small:
        options.backbone, options.steps = "test_convnext", min(options.steps, 35)
    os.environ["FORENSICS_HEADLESS"] = "1"
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        os.environ["FORENSICS_HOME"] = home
        facts = checks(options)
    facts["seconds"] = round(time.monotonic() - started, 1)
    write_json(options.out, facts)
    for name, found in facts.items():
        values = found.items() if isinstance(found, dict) else [("", found)]
        print(f"{name}:", *(f"\n    {key}: {value}" if key else value for key, value in values))
    failed = [name for name, found in facts.items() if isinstance(found, dict) and found.get("passed") is False]
    print(f"FAILED: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
