"""How much of the machine's speed the pipeline keeps: ratios against ceilings and peers measured in the same run.

    python tests/benchmarks/bench_speed.py run [--device cpu] [--images 192] [--repeats 5] [--only classify ...]
    python tests/benchmarks/bench_speed.py report

``classify``  Task A, file to probability, ConvNeXt-B on one crop of 224 pixels: against the same batches already in
              memory, against a plain loop (open, resize, one image at a time, fp32), and against timm's own loader
``localize``  Task B, file to written mask at the image's own size: against the same tiles already in memory; peak memory of
              images of 24 and 100 megapixels
``train``     both tasks, samples per second with degradations and two loader processes: against the same batches in memory,
              by a compiled model or one that is not, whichever is faster
``decode``    a crop out of JPEGs of 12 and 24 megapixels: against Pillow's full decoding and a crop
``grow``      time and memory over 1, 10 and 100 times the images, and over 1 to 100 megapixels

Repeats are interleaved and medians taken.  The pictures are those of the corpus (``FORENSICS_CORPUS``, default
``../shared/corpus``), enlarged where large ones are wanted; weights are random, which changes no speed.  ``run`` leaves
``build/performance/<device>-<part>.json``; ``report`` gathers them in ``docs/performance.json`` and ``.md``, with what
``make load`` has left.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from bench_quality import CORPUS, markdown
from PIL import Image
from timm.data import ImageDataset, create_loader
from torch.amp import GradScaler
from torch.utils.flop_counter import FlopCounterMode

from forensics_lib.data.datasets import epoch_order, numbered_draws
from forensics_lib.data.manifest import indexed, usable
from forensics_lib.device import (
    Machine,
    choose_machine,
    compile_where_it_pays,
    compiled_for_training,
    compute_deterministically,
)
from forensics_lib.images.io import decoded, open_image, pixels_in, read_image
from forensics_lib.images.masks import save_mask
from forensics_lib.inference.predict import Prediction, predict_mask, predict_masks, predict_probabilities
from forensics_lib.models.combined import CombinedModel, build_model
from forensics_lib.params import DataSet, Params
from forensics_lib.run import Run
from forensics_lib.training.epoch import batch_loss, make_optimizer, make_schedule, train_epoch
from forensics_lib.training.state import Step, TrainingState
from forensics_lib.utils.cores import usable_cores
from forensics_lib.utils.files import project_root, read_json, write_json, write_text

BUILD, DOCS = project_root() / "build" / "performance", project_root() / "docs"
PARTS = ("classify", "localize", "train", "decode", "grow")


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] += [time.perf_counter() - started] if number else []
            print(f"  {name}: {time.perf_counter() - started:.2f} s", flush=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def photographs(count: int) -> list[Path]:
    """JPEG and PNG files of the corpus, of mixed sizes."""
    paths = sorted(path for path in (CORPUS / "dataset" / "train").rglob("*.*") if path.suffix.lower() in (".jpg", ".png"))
    if not paths:
        raise SystemExit(f"no pictures in {CORPUS}; set FORENSICS_CORPUS")
    return [paths[index] for index in np.random.default_rng(0).permutation(len(paths))[:count]]


def large_picture(folder: Path, megapixels: float, number: int = 0) -> Path:
    """A JPEG of that many megapixels: a photograph of the corpus, enlarged, with a little noise so that it has detail."""
    target = folder / f"{megapixels:g}-{number}.jpg"
    if not target.is_file():
        width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
        image = Image.open(photographs(50)[number]).convert("RGB").resize((width, width * 3 // 4), Image.Resampling.BICUBIC)
        noise = np.random.default_rng(number).integers(-6, 7, (image.height, image.width, 1), np.int16)
        Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)).save(target, quality=90)
    return target


def table_of(paths: list[Path]) -> pd.DataFrame:
    return pd.DataFrame({"path": [str(path) for path in paths]})


# ---- Parts -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def in_memory(model: CombinedModel, batches: list[torch.Tensor], machine: Machine) -> None:
    for batch in batches:
        with machine.autocast():
            model(machine.to_device(batch)).logits.float().cpu()


def seen(machine: Machine, way: Callable[[], Any]) -> list[torch.Tensor]:
    """The batches that a prediction passes to the model."""
    batches: list[torch.Tensor] = []
    to_device = machine.to_device
    object.__setattr__(machine, "to_device", lambda batch: (batches.append(batch), to_device(batch))[1])
    way()
    object.__delattr__(machine, "to_device")
    return batches


def flops(way: Callable[[], Any]) -> int:
    """Floating-point operations of a way's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


def inference_seconds(
    run: Run,
    task: str,
    rows: pd.DataFrame,
    repeats: int,
    keep: Callable[[Prediction], Any] = lambda _: None,
    peers: dict[str, Callable[[], Any]] | None = None,
    compiled: bool = True,
) -> tuple[dict[str, float], int]:
    """Median seconds to predict and ``keep`` the rows, to pass the same batches from memory, and of peers; and the FLOPs."""
    machine = choose_machine(run.params)
    model = build_model(run.params, task).to(machine.device, memory_format=torch.channels_last).eval()
    predictions = partial(predict_probabilities if task == "A" else predict_masks, model, rows, run.params, machine)

    def ours() -> None:
        for found in predictions():
            keep(found)

    batches = seen(machine, ours)
    ceiling = partial(in_memory, model, batches, machine)
    work = flops(ceiling)
    eager = interleaved({"uncompiled ceiling": ceiling}, 1)
    started = time.perf_counter()
    if compiled:
        compile_where_it_pays(model, pixels=1e12)  # as for the test images of a real run
    in_memory(model, batches[:1], machine)
    eager["compiling"] = time.perf_counter() - started
    return interleaved({"ours": ours, "ceiling": ceiling} | (peers or {}), repeats) | eager, work


def classify(params: Params, images: int, repeats: int) -> dict[str, Any]:
    machine, params = choose_machine(params), params.model_copy(update={"crops_per_image": 1})
    size = machine.images_at_once(params.crop_size**2)
    paths = photographs(images)
    paths = paths[: len(paths) // size * size]  # full batches: those are what a long run consists of
    plain = build_model(params, "A").to(machine.device).eval()

    @torch.no_grad()
    def one_by_one() -> None:
        for path in paths:
            image = Image.open(path).convert("RGB").resize((params.crop_size, params.crop_size))
            x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().to(machine.device) / 255
            plain(x).logits.softmax(1).cpu()

    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            target = Path(folder) / "class" / f"{path.parent.name}-{path.name}"
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(path.resolve())

        @torch.no_grad()
        def by_timm() -> None:
            loader = create_loader(ImageDataset(folder), (3, params.crop_size, params.crop_size), size, num_workers=2,
                                   use_prefetcher=False, persistent_workers=False)  # fmt: skip
            for x, _ in loader:
                plain(x.to(machine.device)).logits.softmax(1).cpu()

        peers = {"plain loop": one_by_one, "timm": by_timm}
        seconds, _ = inference_seconds(Run(params, CORPUS), "A", table_of(paths), repeats, peers=peers)
    facts = {f"{name}, images/s": len(paths) / seconds[name] for name in ("ours", "ceiling", *peers)}
    facts |= {"share of the ceiling": seconds["ceiling"] / seconds["ours"], "seconds of compiling": seconds["compiling"]}
    facts["ceiling without compilation, images/s"] = len(paths) / seconds["uncompiled ceiling"]
    return facts | {
        "times the plain loop": seconds["plain loop"] / seconds["ours"],
        "times timm's loader and loop": seconds["timm"] / seconds["ours"],
    }


def localize(params: Params, images: int, repeats: int) -> dict[str, Any]:
    run = Run(params.model_copy(update={"mask_scales": [1.0]}), CORPUS)
    with tempfile.TemporaryDirectory() as folder:
        paths = [large_picture(Path(folder), 1.5 + number % 3, number) for number in range(max(2, images // 48))]
        pixels = sum(Image.open(path).width * Image.open(path).height for path in paths)

        def keep(found: Prediction) -> None:
            save_mask(Path(folder) / "mask.npz", found.mask)

        seconds, _ = inference_seconds(run, "B", table_of(paths), repeats, keep)
        facts = {f"{name}, megapixels/s": pixels / 1e6 / seconds[name] for name in ("ours", "ceiling")}
        facts["share of the ceiling"] = seconds["ceiling"] / seconds["ours"]
        for megapixels in (24, 100):
            found = alone(MEMORY, str(large_picture(Path(folder), megapixels)), params.backbone, params.device)
            facts[f"peak memory above the model, {megapixels} megapixels, GB"] = found["peak_gb"]
    return facts


# Peak resident memory of one mask, file to mask, above what the process holds with the model loaded and used once
MEMORY = """
import json, sys
from pathlib import Path
import numpy as np, pandas as pd
from forensics_lib.inference.predict import predict_mask, predict_masks
from forensics_lib.images.masks import save_mask
from forensics_lib.device import choose_machine
from forensics_lib.models.combined import build_model
from forensics_lib.params import Params

def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e6

params = Params(backbone=sys.argv[2], device=sys.argv[3], pretrained=False, workers=0)
machine = choose_machine(params)
model = build_model(params, "B").to(machine.device).eval()
predict_mask(model, np.zeros((600, 600, 3), np.uint8), params, machine)
before = held("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # peaks are counted from here on
(found,) = predict_masks(model, pd.DataFrame({"path": [sys.argv[1]]}), params, machine)
save_mask(Path(sys.argv[1]).with_suffix(".npz"), found.mask)
print(json.dumps({"peak_gb": held("VmHWM") - before, "megapixels": found.mask.size / 1e6}))
"""


def alone(code: str, *arguments: str) -> dict[str, Any]:
    """What ``code`` prints as its last line, JSON, in a process of its own."""
    environment = os.environ | {"FORENSICS_HEADLESS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def learn(fit: TrainingState, batches: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    fit.model.train()
    for batch in batches:
        loss = batch_loss(fit, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()


def deterministically(way: Callable[[], Any]) -> None:
    compute_deterministically(True)
    way()
    compute_deterministically(False)


def training_seconds(
    run: Run, task: str, rows: pd.DataFrame, repeats: int, compiled: bool = True
) -> tuple[dict[str, float], int]:
    """Median seconds to train on the rows, and on the same batches in memory; and the FLOPs."""
    machine, params = choose_machine(run.params), run.params
    model = build_model(params, task).to(machine.device, memory_format=torch.channels_last)
    model.freeze_backbone(params.finetune_stages)
    names = ("ours", "uncompiled ceiling", "compiled ceiling")[: 3 if compiled else 2]
    fits = {name: TrainingState(run, task, copy.deepcopy(model), machine, rows, rows, equalize=True) for name in names}
    fit, plain = fits["ours"], fits["uncompiled ceiling"]
    if compiled:
        fit.trained = compiled_for_training(fit.model, task, params.batch_size, 1e12)  # as for the images of a real run
        fits["compiled ceiling"].trained = torch.compile(fits["compiled ceiling"].model, dynamic=False)
    optimizers = {name: make_optimizer(one.model, params.lr_finetune, params) for name, one in fits.items()}
    step = Step("finetune", 1, optimizers["ours"], make_schedule(optimizers["ours"], 1000, 0.1), GradScaler(enabled=False))
    order = numbered_draws(epoch_order(rows["label"].to_numpy(int), 0, 0))
    parts = np.array_split(order, -(-len(order) // params.batch_size))
    batches = list(plain.batches.epoch(0, parts))
    plain.batches.close()
    ways = {name: partial(learn, one, batches, optimizers[name]) for name, one in fits.items()}
    work = flops(ways["uncompiled ceiling"])
    ways["ours"] = partial(train_epoch, fit, step, 0)
    if machine.device.type == "cuda":
        ways["deterministic"] = partial(deterministically, ways["uncompiled ceiling"])
    seconds = interleaved(ways, repeats)
    fit.batches.close()
    return seconds, work


def train(params: Params, images: int, repeats: int) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for task, root, layout in (("A", "dataset", "own"), ("B", "dataset_taskB/TGIF", "tgif")):
        rows = usable(indexed(DataSet(root=str(CORPUS / root), layout=layout)), "train")
        rows = rows.sample(min(len(rows), images), random_state=0).reset_index(drop=True)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["FORENSICS_HOME"] = folder
            run = Run(params.model_copy(update={"workers": 2, "ema": 0.0}), CORPUS)
            seconds, _ = training_seconds(run, task, rows, repeats)
            del os.environ["FORENSICS_HOME"]
        facts |= {f"Task {task}: {name}, samples/s": len(rows) / value for name, value in seconds.items()}
        fastest = min(seconds[f"{mode} ceiling"] for mode in ("uncompiled", "compiled"))
        facts[f"Task {task}: share of the ceiling"] = fastest / seconds["ours"]
    return facts


def decode(params: Params, images: int, repeats: int) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for megapixels in (12, 24):
            paths = [large_picture(Path(folder), megapixels, number) for number in range(4)]

            def by_pillow(paths: list[Path] = paths) -> None:
                for path in paths:
                    np.asarray(Image.open(path).convert("RGB").crop((1000, 1000, 1224, 1224)))

            def ours(paths: list[Path] = paths) -> None:
                for path in paths:
                    with open_image(path) as image:
                        pixels_in(decoded(image), slice(1000, 1224), slice(1000, 1224))

            seconds = interleaved({"ours": ours, "Pillow": by_pillow}, repeats)
            facts |= {f"{megapixels} megapixels: {name}, crops/s": len(paths) / value for name, value in seconds.items()}
            facts[f"{megapixels} megapixels: times Pillow"] = seconds["Pillow"] / seconds["ours"]
    return facts


# Seconds and peak memory of Task A over a number of files, with the laptop's backbone
GROWTH = """
import json, resource, sys, time
import pandas as pd
from forensics_lib.inference.predict import predict_probabilities
from forensics_lib.device import choose_machine
from forensics_lib.models.combined import build_model
from forensics_lib.params import Params
params = Params(backbone="tf_efficientnet_lite0", device=sys.argv[3], pretrained=False, crops_per_image=2)
machine, paths, count = choose_machine(params), json.load(open(sys.argv[1])), int(sys.argv[2])
model = build_model(params, "A")
rows = pd.DataFrame({"path": (paths * (count // len(paths) + 1))[:count]})
list(predict_probabilities(model, rows.head(40), params, machine))
started = time.perf_counter()
list(predict_probabilities(model, rows, params, machine))
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
"""


def grow(params: Params, images: int, repeats: int) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder) / "paths.json"
        listing.write_text(json.dumps([str(path) for path in photographs(200)]))
        for count in (40, 400, 4000):
            found = [alone(GROWTH, str(listing), str(count), params.device) for _ in range(repeats if count < 4000 else 1)]
            facts[f"{count} images: ms/image"] = statistics.median(one["seconds"] for one in found) / count * 1e3
            facts[f"{count} images: peak memory, GB"] = max(one["peak_gb"] for one in found)
        small = params.model_copy(update={"backbone": "tf_efficientnet_lite0", "decoder_channels": 64})
        machine = choose_machine(small)
        model = build_model(small, "B").to(machine.device, memory_format=torch.channels_last).eval()
        for megapixels in (1, 10, 100):
            path = large_picture(Path(folder), megapixels)
            image = read_image(path)
            ways = {f"{megapixels} megapixels": lambda image=image: predict_mask(model, image, small, machine)}
            (seconds,) = interleaved(ways, repeats if megapixels < 100 else 1).values()
            facts[f"{megapixels} megapixels: s/megapixel"] = seconds / (image.shape[0] * image.shape[1] / 1e6)
            found = alone(MEMORY, str(path), small.backbone, params.device)
            facts[f"{megapixels} megapixels: peak memory above the model, GB"] = found["peak_gb"]
    return facts


# ---- Report ------------------------------------------------------------------------------------------------------------

TARGETS = [
    ("classify", "share of the ceiling", "at least", 0.85),
    ("classify", "times the plain loop", "at least", 5.0),
    ("classify", "times timm's loader and loop", "at least", 2.5),
    ("localize", "share of the ceiling", "at least", 0.85),
    ("localize", "peak memory above the model, 24 megapixels, GB", "at most", 1.0),
    ("localize", "peak memory above the model, 100 megapixels, GB", "at most", 1.5),
    ("train", "Task A: share of the ceiling", "at least", 0.85),
    ("train", "Task B: share of the ceiling", "at least", 0.85),
]


def report() -> None:
    known = read_json(DOCS / "performance.json") | {path.stem: read_json(path) for path in sorted(BUILD.glob("*.json"))}
    known["load"] = read_json(BUILD.parent / "load" / "load.json") or known.get("load", {})
    write_json(DOCS / "performance.json", known)
    load, parts = known.pop("load"), [_HEAD]
    for device in sorted({facts["device"] for facts in known.values()}):
        mine = {facts["part"]: facts for facts in known.values() if facts["device"] == device}
        parts.append(f"\n## On {device}: {', '.join(sorted({facts['machine'] for facts in mine.values()}))}\n")
        rows = []
        for part, name, bound, limit in TARGETS:
            if part in mine:
                value = mine[part]["figures"][name]
                met = value >= limit if bound == "at least" else value <= limit
                rows.append([part, name, f"{bound} {limit:g}", f"{value:.2f}", "met" if met else "MISSED"])
        parts.append(markdown(pd.DataFrame(rows, columns=["part", "figure", "wanted", "measured", ""])))
        for part in PARTS:
            if part in mine:
                figures = [[name, f"{value:.3g}"] for name, value in mine[part]["figures"].items()]
                parts.append(f"\n### {part}\n\n`{mine[part]['command']}`\n")
                parts.append(markdown(pd.DataFrame(figures, columns=["figure", "measured"])))
        parts.append(
            f"\n### {IMAGES:,} images\n\nHours at the rates above; *eight* machines or GPUs take an eighth of them at "
            "best: no scaling was measured. Masks are at one scale: a pyramid has a third more pixels.\n"
        )
        parts.append(markdown(expected_hours({name: facts["figures"] for name, facts in mine.items()})))
    if load:
        grown = ", ".join(load["grown"]) or "none"
        held = pd.DataFrame(load["jobs"]).set_index("job").drop(columns=["seconds", "images/s"]).round(2)
        parts += [_LOAD, markdown(held.T.reset_index(names="job"))]
        parts += [f"\nJobs whose last quarter held more than their second one: {grown}."]
    write_text(DOCS / "performance.md", "\n".join(parts) + "\n")
    print(f"wrote {DOCS / 'performance.md'}")


_LOAD = """
## Many images

`make load`, a small model: memory (GB), open files and threads of all processes together, at most in the second (2/4) and in
the last quarter (4/4) of a job's time. The machine may have done other work too, so nothing is said of time.
"""
IMAGES = 400_000
RATES = {
    "Task A: an epoch of step 2": ("train", "Task A: ours, samples/s"),
    "Task A: probabilities from one crop": ("classify", "ours, images/s"),
    "Task B: an epoch of step 2": ("train", "Task B: ours, samples/s"),
    "Task B: masks of images of one megapixel": ("localize", "ours, megapixels/s"),
}


def expected_hours(figures: dict[str, dict[str, float]]) -> pd.DataFrame:
    """How long ``IMAGES`` images take at the measured rates, for the parts that were measured."""
    hours = {job: IMAGES / figures[part][name] / 3600 for job, (part, name) in RATES.items() if part in figures}
    rows = [[job, f"{value:.3g}", f"{value / 8:.2g}"] for job, value in hours.items()]
    return pd.DataFrame(rows, columns=["job", "this machine", "eight"])


_HEAD = """# Speed and memory

Made by `make bench`; [performance.json](performance.json) has the numbers. The model is ConvNeXt-B with random weights, which
change no speed; `grow` and `make load` take `tf_efficientnet_lite0`. Ratios compare ways that took turns in one
process; medians of the repeats. *Ceiling*: the same batches, already in memory, through the same model in the fastest mode
found. What each part measures is said in `tests/benchmarks/bench_speed.py`. The plain loop computes in fp32: where the
processor lacks AMX, bf16 gains so little over it that the ceiling itself is less than five times the plain loop. Training is
compiled where it is long and gains by it (on a CPU: Task A while a part of the model is frozen, from PyTorch 2.12 on). On a
CPU the loader processes share the cores with the network. No GPU has been seen yet: nothing here says how fast one is.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backbone", default="convnext_base")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    if options.command == "report":
        report()
        return
    os.environ["FORENSICS_HEADLESS"] = "1"
    params = Params(backbone=options.backbone, pretrained=False, device=options.device, batch_size=16)
    for part in options.only:
        print(f"=== {part}", flush=True)
        figures = globals()[part](params, options.images, options.repeats)
        facts = {"part": part, "device": options.device, "machine": f"{choose_machine(params)}, {platform.machine()}, {cpu()}"}
        facts |= {"versions": f"torch {torch.__version__}, timm {timm.__version__}", "backbone": options.backbone}
        facts |= {"command": f"python tests/benchmarks/bench_speed.py {' '.join(sys.argv[1:])}"}
        write_json(BUILD / f"{options.device}-{part}.json", facts | {"figures": figures})
        print("\n".join(f"    {name}: {value:.3g}" for name, value in figures.items()), flush=True)


def cpu() -> str:
    """The processor's name and how many cores may be used."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {usable_cores()} cores"


if __name__ == "__main__":
    main()
