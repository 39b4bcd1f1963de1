"""Whether a GPU computes what a CPU does, trains both tasks, and how fast: at most eight minutes on one H100, no downloads.

    python tests/benchmarks/gpu_check.py [--device cuda] [--backbone convnext_base] [--steps 100] [--small]

Everything is done on the built-in sample, with random weights, by the library's own functions:

``train``   both tasks for about ``--steps`` updates: losses finite and falling, peak memory, images per second
``answers`` the trained models' probabilities and masks on the GPU against those of the CPU: at most 0.01 apart
``resume``  a training stopped within an epoch, and one killed within one, end bit for bit as one that was not disturbed, with
            ``deterministic``
``speed``   inference and training as ``bench_speed.py`` measures them, on the sample: images per second, shares of the ceiling
            and of the card's own rate of matrix products, peak memory, what compiling gains and ``deterministic`` costs

``--small`` is the form for a test: a tiny backbone, few steps, nothing compiled, on any device.  The results are printed, and
written to ``build/gpu_check.json``.  The exit status is 1 where a check fails.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from bench_speed import inference_seconds, interleaved, training_seconds
from PIL import Image

from forensics_lib.data.manifest import build_manifest, usable
from forensics_lib.device import HALVES, Machine, choose_machine, compute_deterministically
from forensics_lib.inference.predict import predict_masks, predict_probabilities
from forensics_lib.models.checkpoint import load_model, read_checkpoint
from forensics_lib.params import load_params
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
        "lr_finetune": 3e-3 if options.small else 1e-4,
        "val_limit": 32,
        "crop_size": 64 if options.small else 224,  # in less a mask is hardly learned
        "tile_size": 64 if options.small else 512,
        "workers": 0 if options.small else "auto",
    }
    params = load_params("params/sample.yaml", values | changes)
    return Run(params, data)


def check_training(run: Run, task: str) -> dict[str, Any]:
    machine = choose_machine(run.params)
    reset_peak_memory(machine)
    history = train(run, task, build_manifest(run, task))
    losses = history.loc[history["step"] == "finetune", "train_loss"].to_numpy()
    facts = {"losses": losses.tolist(), "images_per_second": float(history["images_per_second"].iloc[-1])}
    facts["peak_memory_gib"] = peak_memory(machine)
    half = len(losses) // 2  # single epochs of few images scatter
    return facts | {"passed": bool(np.isfinite(losses).all() and losses[-half:].mean() < losses[:half].mean())}


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
    """Train with ``deterministic``: undisturbed, stopped within an epoch, and killed within one; compare every weight."""
    changes = {"deterministic": True, "epochs_finetune": 2, "val_limit": 8}
    whole, stopped, killed = (make_run(data, options, run_name=name, **changes) for name in ("whole", "stopped", "killed"))
    manifest = build_manifest(whole, "A")
    train(whole, "A", manifest)
    try:
        with signalled(signal.SIGTERM, batch=10):
            train(stopped, "A", manifest)
        raise RuntimeError("the training did not stop")
    except KeyboardInterrupt:
        print("stopped within an epoch, as wanted: going on")
    updates = -(-len(usable(manifest, "train")) // whole.params.batch_size)
    child = multiprocessing.get_context("spawn").Process(target=train_until_killed, args=(killed, updates + 3))
    child.start()
    child.join()
    if child.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the training was not killed, but ended with status {child.exitcode}")
    for run in (stopped, killed):
        train(run, "A", manifest)
    compute_deterministically(False)
    first, *others = (read_checkpoint(run.finetuned_model("A"))["model"] for run in (whole, stopped, killed))
    equal = [all(torch.equal(value, other[name]) for name, value in first.items()) for other in others]
    return {"after SIGTERM": equal[0], "after SIGKILL": equal[1], "passed": all(equal)}


def train_until_killed(run: Run, batch: int) -> None:
    """For a process of its own, which ends within step 2, after the epoch of step 1."""
    with signalled(signal.SIGKILL, batch):
        train(run, "A", build_manifest(run, "A"))


@contextmanager
def signalled(number: int, batch: int) -> Iterator[None]:
    """Within the block this process gets a signal at that batch of a training."""
    loss, calls = epochs.batch_loss, count(1)

    def signals(*arguments: Any) -> torch.Tensor:
        if next(calls) == batch:
            os.kill(os.getpid(), number)
        return loss(*arguments)

    epochs.batch_loss = signals
    try:
        yield
    finally:
        epochs.batch_loss = loss


def measure_speed(run: Run, images: int, repeats: int, compiled: bool) -> dict[str, Any]:
    """Rates of both tasks, and their shares of the ceiling (batches in memory) and of the card's rate of matrix products."""
    run = replace(run, params=run.params.model_copy(update={"mask_scales": [1.0]}))  # so that all tiles are whole
    machine = choose_machine(run.params)
    peak = matrix_rate(machine)
    facts: dict[str, Any] = {f"matrix products in {machine.precision}, TFLOP/s": peak / 1e12}
    for task in "AB":
        rows = usable(build_manifest(run, task), "train")
        chosen = np.linspace(0, len(rows) - 1, 4 * images).astype(int)  # of both classes, each as often as it takes
        learned = rows.sort_values("label").iloc[chosen].reset_index(drop=True)
        large = enlarged(rows["path"], run.folder / "large", 2 * run.params.tile_size, 16 * images if task == "A" else images)
        for job, measure, of in (("inference", inference_seconds, large), ("training", training_seconds, learned)):
            torch.cuda.empty_cache()
            reset_peak_memory(machine)
            seconds, work = measure(run, task, of, repeats, compiled=compiled)
            ceiling = min(value for name, value in seconds.items() if name.endswith("ceiling"))
            facts[f"Task {task}, {job}: images/s"] = len(of) / seconds["ours"]
            facts[f"Task {task}, {job}: share of the ceiling"] = ceiling / seconds["ours"]
            facts[f"Task {task}, {job}: share of matrix products"] = work / seconds["ours"] / peak
            if compiled:
                facts[f"Task {task}, {job}: gain of compiling"] = seconds["uncompiled ceiling"] / ceiling
            if job == "inference":  # training's is that of its check: here several models are in memory
                facts[f"Task {task}, {job}: peak memory, GiB"] = peak_memory(machine)
            if "deterministic" in seconds:
                facts[f"Task {task}, {job}: cost of deterministic"] = seconds["deterministic"] / seconds["uncompiled ceiling"]
    return facts


def enlarged(paths: pd.Series, folder: Path, side: int, wanted: int) -> pd.DataFrame:
    """Some of the images as squares of ``side`` pixels, which have several whole tiles, each as often as it takes."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [str(folder / f"{number}.jpg") for number in range(min(32, len(paths)))]
    for source, target in zip(paths, targets, strict=False):
        Image.open(source).convert("RGB").resize((side, side)).save(target, quality=90)
    return pd.DataFrame({"path": np.resize(targets, wanted)})


def matrix_rate(machine: Machine) -> float:
    """FLOP/s of large square matrix products in the machine's precision."""
    cuda = machine.device.type == "cuda"
    side, times = (8192, 100) if cuda else (512, 3)
    a, b = (torch.randn(side, side, device=machine.device, dtype=HALVES.get(machine.precision)) for _ in range(2))
    (seconds,) = interleaved({"matrix products": lambda: [a @ b for _ in range(times)]}, 3).values()
    return 2 * side**3 * times / seconds


def reset_peak_memory(machine: Machine) -> None:
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(machine: Machine) -> float | None:
    """GiB, None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if machine.device.type == "cuda" else None


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
    facts["speed"] = measure_speed(run, 2 if options.small else 64, 1 if options.small else 3, compiled=not options.small)
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
        options.backbone, options.steps = "test_convnext", min(options.steps, 50)
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
