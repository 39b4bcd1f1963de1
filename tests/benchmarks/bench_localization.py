"""How well Task B finds manipulated regions: this project's recipe against a naive one and against floors.

    python tests/benchmarks/bench_localization.py run [--recipes ours naive] [--data official open]
                                                      [--start clip pretrained] [--seeds 0 1 2]
                                                      [--set key=value ...] [--name label]
    python tests/benchmarks/bench_localization.py report

``run`` trains on the training split of the corpus' ``dataset_taskB/TGIF`` (simulated contents under TGIF's names), chooses
epoch and thresholds on its validation split, and scores its testing split, ``dataset_taskB/validation`` (real inpainting,
copy-move, splices) and ``test/taskB``.  Each run leaves ``build/localization/<run>.json``; ``report`` gathers them in
``docs/localization.json`` and writes ``docs/localization.md``.  A run that either holds is not done again.

``--start clip`` has the recipe of ``params/clip_localization.yaml``; else both recipes start from the same ImageNet weights and
train for the same time.  The naive one squeezes whole images to 224
pixels, gives the backbone a decoder of two levels with skip connections (a small U-Net), minimises cross-entropy of image
and pixels with Adam, scales masks back up, and decides at 0.5.  The corpus is looked for in ``FORENSICS_CORPUS``, default
``../shared/corpus``.
"""

from __future__ import annotations

import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from bench_quality import CORPUS, SIDE, arguments, differences, markdown, median, squeezed, verdict
from PIL import Image
from pretrained_weights import weights_file
from scipy.ndimage import gaussian_filter, uniform_filter
from torch import nn

from forensics_lib.data.manifest import build_manifest, indexed, test_images, usable
from forensics_lib.device import Machine, choose_machine
from forensics_lib.evaluation.evaluate import evaluate
from forensics_lib.evaluation.metrics import (
    binned,
    image_metrics,
    localization_intervals,
    localization_metrics,
    pixel_table,
    threshold_free_scores,
    value_counts,
)
from forensics_lib.evaluation.predictions import Predictions, predict_labelled, truth_mask
from forensics_lib.evaluation.robustness import Change
from forensics_lib.images.io import read_image
from forensics_lib.inference.predict import predict_mask
from forensics_lib.inference.probabilities import calibrated, round_probs
from forensics_lib.models.checkpoint import load_model
from forensics_lib.params import DataSet, Params, load_params, parse_settings
from forensics_lib.reports.figures import MaskExample, mask_gallery, write_figure
from forensics_lib.run import Run, Thresholds, stored_thresholds
from forensics_lib.synthesis.sample import build_sample
from forensics_lib.training.loop import train
from forensics_lib.utils.cores import usable_cores
from forensics_lib.utils.files import project_root, read_json, write_json, write_text

BUILD, DOCS = project_root() / "build" / "localization", project_root() / "docs"
BACKBONE = "tf_efficientnet_lite0"
EPOCHS = {"official": 22, "open": 12}  # of step 2: 20 and 40 minutes on 2 cores
SETS = {"simulated": "TGIF testing split", "real": "dataset_taskB/validation", "test": "test/taskB"} | {
    "edits": "dataset_taskB/edits"
}
DATA, STARTS = ["official", "open"], ["clip", "pretrained"]
KINDS = [(recipe, data, start) for start in STARTS for recipe in ("ours", "naive") for data in DATA]  # of runs
CHANGES = {"JPEG 75": Change("JPEG quality", 75), "half size": Change("shrunk", 0.5)}  # of the real pairs, of runs of seed 0
Predict = Callable[[pd.DataFrame], Predictions]


def params_for(data: str, seed: int, name: str, settings: dict[str, Any], start: str = "pretrained") -> Params:
    values: dict[str, Any] = {"run_name": name, "tasks": ["B"], "seed": seed, "data_root": str(CORPUS)}
    values["data"] = [{"root": str(CORPUS / "dataset_taskB" / "TGIF"), "layout": "tgif"}]
    if data == "open":  # and all training photographs of the corpus
        photographs = {"photos": "authentic", "dataset": "own", "dataset_open": "own", "dataset_modern": "own"}
        values["data"] += [{"root": str(CORPUS / name), "layout": kind, "task": "B"} for name, kind in photographs.items()]
        values["data"][1]["split"] = "train"
        values |= {"run_type": "open", "paste": 0.5}
    if start == "clip":
        return load_params("params/clip_localization.yaml", values | settings)
    values |= {"epochs_head": 1, "epochs_finetune": EPOCHS[data]}
    values |= {"backbone": BACKBONE, "pretrained": True, "lr_finetune": 5.0e-4}
    return load_params("params/laptop.yaml", values | settings)


def sets(manifest: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The labelled images that are scored."""
    real = indexed(DataSet(root=str(CORPUS / "dataset_taskB" / "validation"), layout="task_b_validation"))
    test = test_images(CORPUS / "test" / "taskB")
    names = [Path(path).name for path in test["path"]]
    labels = pd.read_csv(CORPUS / "labels" / "taskB_test.csv").set_index("image_id").loc[names]
    masks = [str(CORPUS / "labels" / "taskB_masks" / f"{Path(name).stem}.png") for name in names]
    test = test.assign(label=labels["label"].to_numpy(int), kind=labels["kind"].to_numpy(), mask_path=masks)
    test = test.assign(method=labels["method"].to_numpy())
    edits = DataSet(root=str(CORPUS / "dataset_taskB" / "edits" / "edits.csv"), layout="table", split="test", task="B")
    parts = {"simulated": usable(manifest, "test"), "real": usable(real, "val"), "test": test}
    return parts | {"edits": usable(indexed(edits), "test")}


def draw_masks(run: Run, thresholds: Thresholds) -> None:
    """``build/localization/masks.png``: the run's best, middling and worst masks of the sample's manipulated photographs.

    Those may be shown; the corpus' may not.
    """
    rows = indexed(
        DataSet(root=str(build_sample(BUILD / "sample") / "dataset_taskB" / "validation"), layout="task_b_validation")
    )
    rows = usable(rows, "val").loc[lambda table: table["label"] == 1]
    model, machine = load_model(run.finetuned_model("B"), "B")[0], choose_machine(run.params)
    found = []
    for _, row in rows.iterrows():
        image = read_image(row["path"])
        prob, mask = predict_mask(model, image, run.params, machine)
        truth, flagged = truth_mask(row, image.shape[:2]), mask >= thresholds.loc_threshold
        iou = (truth & flagged).sum() / (truth | flagged).sum()
        title = f"{row['method']} ({row['kind']})\nIoU {iou:.2f}, prob {calibrated(np.array(prob), thresholds):.2f}"
        found.append((iou, MaskExample(title, image, mask, truth)))
    ranked = [example for _, example in sorted(found, key=lambda pair: -pair[0])]
    shown = [ranked[round(place)] for place in np.linspace(0, len(ranked) - 1, 6)]
    write_figure(mask_gallery(shown, thresholds.loc_threshold, "From the best to the worst mask"), BUILD / "masks")


def predictions(probs: list[float], counts: list[np.ndarray]) -> Predictions:
    """What a recipe says of images, of their probabilities and ``value_counts``."""
    exact = pd.DataFrame([threshold_free_scores(of_image) for of_image in counts])
    return Predictions(np.array(probs), {}, np.stack([binned(of_image) for of_image in counts]), exact)


def scored(rows: pd.DataFrame, found: Predictions, thresholds: Thresholds) -> dict[str, Any]:
    """The figures of the tables for one set."""
    labels, probs = rows["label"].to_numpy(int), found.probs
    called = probs >= thresholds.threshold
    pixels = localization_metrics(found.histograms, thresholds.loc_threshold, called, found.exact)
    table = pixel_table(found.histograms, thresholds.loc_threshold, called)
    facts = {key: pixels[f"{key}_manipulated"] for key in ("iou", "submitted_iou", "pixel_f1", "best_pixel_f1", "pixel_auc")}
    facts |= {f"{kind}{key}": pixels[f"{kind}{key}"] for kind in ("", "submitted_") for key in ("iou_all", "flagged_authentic")}
    facts |= {key: image_metrics(labels, probs, thresholds.threshold)[key] for key in ("f1", "auc", "fpr")}
    for kind in ("sp", "fr"):
        members = table[(rows["kind"] == kind).to_numpy() & (labels == 1)]
        facts |= {f"iou_{kind}": members["iou"].mean(), f"submitted_iou_{kind}": members["submitted_iou"].mean()}
    facts = {key: None if np.isnan(value) else round(float(value), 4) for key, value in facts.items()}
    made = rows.loc[labels == 1, "method"]
    by_method = {method: round(float(table["iou"][part.index].mean()), 4) for method, part in made.groupby(made)}
    ends = localization_intervals(found.histograms, thresholds.loc_threshold, called, found.exact, groups=_photographs(rows))
    shown = {key: ends[f"{key}_manipulated"] for key in ("iou", "pixel_auc")} | {"flagged": ends["submitted_flagged_authentic"]}
    return facts | {"by_method": by_method, "intervals": {key: np.round(pair, 4).tolist() for key, pair in shown.items()}}


def _photographs(rows: pd.DataFrame) -> np.ndarray:
    """The photograph of each image; an image without a known one is its own."""
    own = rows["path"] if "path" in rows else pd.Series(rows.index.astype(str), rows.index)
    return (rows["group"].fillna(own) if "group" in rows else own).to_numpy()


def ours(run: Run, manifest: pd.DataFrame) -> dict[str, Any]:
    metrics = train(run, "B", manifest)
    thresholds = evaluate(run, "B", manifest).thresholds
    model, _ = load_model(run.finetuned_model("B"), "B")
    machine = choose_machine(run.params)

    def predicted(rows: pd.DataFrame, change: Change | None = None) -> Predictions:
        result = predict_labelled(model, "B", rows, run.params, machine, change)
        return replace(result, probs=round_probs(calibrated(result.probs, thresholds)))

    facts = results(manifest, predicted, thresholds)
    if run.params.seed == 0:
        real = sets(manifest)["real"]
        facts["changes"] = {name: scored(real, predicted(real, change), thresholds) for name, change in CHANGES.items()}
    epochs = metrics[["step", "epoch", "train_loss", "val_auc", "val_iou", "seconds"]].round(4).to_dict("records")
    return facts | {"seconds": round(float(metrics["seconds"].sum()), 1), "epochs": epochs}


class SmallUNet(nn.Module):
    """A timm backbone, two levels of upsampling with skip connections, and a linear image head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model(BACKBONE, num_classes=0)
        self.backbone.load_state_dict(torch.load(weights_file(), weights_only=True), strict=False)
        channels = [stage["num_chs"] for stage in self.backbone.feature_info][-3:]
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a + b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in ((channels[2], channels[1]), (channels[1], channels[0]))
        )
        self.mask, self.head = nn.Conv2d(channels[0], 1, 1), nn.Linear(channels[2], 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(N, 3, 224, 224)`` in [0, 1] to image logits ``(N,)`` and mask logits ``(N, 224, 224)``."""
        *_, fine, middle, y = self.backbone.forward_intermediates((x - 0.5) / 0.5, intermediates_only=True)
        image = self.head(y.mean((2, 3)))[:, 0]
        for layer, skip in zip(self.up, (middle, fine), strict=True):
            y = layer(torch.cat([F.interpolate(y, skip.shape[-2:], mode="bilinear"), skip], 1))
        return image, F.interpolate(self.mask(y), x.shape[-2:], mode="bilinear")[:, 0]


def naive(run: Run, manifest: pd.DataFrame, seconds: float) -> dict[str, Any]:
    """Head and decoder for one pass, then everything, by Adam at 1e-3 and 1e-4."""
    torch.manual_seed(run.params.seed)
    machine, rows = choose_machine(run.params), usable(manifest, "train")
    model = SmallUNet().to(machine.device, memory_format=torch.channels_last)
    images = torch.from_numpy(np.stack([squeezed(read_image(path)) for path in rows["path"]]))
    truths = torch.from_numpy(np.stack([_squeezed_truth(row) for _, row in rows.iterrows()]))
    labels = torch.from_numpy(rows["label"].to_numpy(np.float32))
    rng, started, passes = np.random.default_rng(run.params.seed), time.monotonic(), 0
    for all_of_it, rate in ((False, 1e-3), (True, 1e-4)):
        model.backbone.requires_grad_(all_of_it)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
        model.train()
        done = False
        while not done:
            for batch in np.array_split(rng.permutation(len(rows)), -(-len(rows) // 32)):
                x, truth = images[batch], truths[batch]
                flipped = torch.from_numpy(rng.random(len(batch)) < 0.5)
                x[flipped], truth[flipped] = x[flipped].flip(-1), truth[flipped].flip(-1)
                with machine.autocast():
                    image, mask = model(machine.to_device(x))
                loss = F.binary_cross_entropy_with_logits(image.float(), labels[batch].to(machine.device))
                loss = loss + F.binary_cross_entropy_with_logits(mask.float(), truth.float().to(machine.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            passes += 1
            done = not all_of_it or time.monotonic() - started >= seconds
            print(f"naive pass {passes}: {time.monotonic() - started:.0f} of {seconds:.0f} s", flush=True)
    trained = time.monotonic() - started
    model.eval()

    def predicted(rows: pd.DataFrame) -> Predictions:
        return _naive_predictions(model, rows, machine)

    thresholds = Thresholds(threshold=0.5, loc_threshold=0.5)
    return results(manifest, predicted, thresholds) | {"seconds": round(trained, 1), "passes": passes}


def _squeezed_truth(row: pd.Series) -> np.ndarray:
    mask = truth_mask(row, (int(row["height"]), int(row["width"])))
    return np.asarray(Image.fromarray(mask).resize((SIDE, SIDE), Image.Resampling.NEAREST))


@torch.inference_mode()
def _naive_predictions(model: SmallUNet, rows: pd.DataFrame, machine: Machine) -> Predictions:
    probs, counts = [], []
    for _, row in rows.iterrows():
        image = read_image(row["path"])
        with machine.autocast():
            logit, mask = model(machine.to_device(torch.from_numpy(squeezed(image))[None]))
        probs.append(logit.float().sigmoid().item())
        mask = F.interpolate(mask.float().sigmoid()[None], image.shape[:2], mode="bilinear")[0, 0].cpu().numpy()
        counts.append(value_counts(mask, truth_mask(row, image.shape[:2])))
    return predictions(probs, counts)


def floors(manifest: pd.DataFrame) -> dict[str, Any]:
    """What no look for traces gives: everything called manipulated, with masks of ``FLOORS``."""
    found = {}
    for name, fill in FLOORS.items():

        def predicted(rows: pd.DataFrame, fill: Callable[[np.ndarray], np.ndarray] = fill) -> Predictions:
            counts = []
            for _, row in rows.iterrows():
                image = read_image(row["path"])
                counts.append(value_counts(fill(image), truth_mask(row, image.shape[:2])))
            return predictions([1.0] * len(rows), counts)

        found[name] = results(manifest, predicted, Thresholds(threshold=0.5, loc_threshold=0.5))
    return found


def _centre_box(image: np.ndarray) -> np.ndarray:
    mask, (height, width) = np.zeros(image.shape[:2]), image.shape[:2]
    mask[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = 1
    return mask


def _saliency(image: np.ndarray) -> np.ndarray:
    """What stands out, by the spectral residual (Hou and Zhang, CVPR 2007): masks that follow objects are no better."""
    grey = np.asarray(Image.fromarray(image).convert("L").resize((64, 64)), float)
    spectrum = np.fft.fft2(grey)
    log = np.log(np.abs(spectrum) + 1e-9)
    residual = log - uniform_filter(log, 3, mode="wrap")
    found = gaussian_filter(np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2, 3)
    ranks = found.ravel().argsort().argsort().reshape(found.shape) / found.size
    mask = np.asarray(Image.fromarray(ranks.astype(np.float32)).resize(image.shape[1::-1], Image.Resampling.BILINEAR))
    return (mask - 0.3).clip(0, 1)  # from 0.5 on, the most salient fifth


FLOORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "empty mask": lambda image: np.zeros(image.shape[:2]),
    "full mask": lambda image: np.ones(image.shape[:2]),
    "centre box": _centre_box,
    "saliency": _saliency,
}


def results(manifest: pd.DataFrame, predicted: Predict, thresholds: Thresholds) -> dict[str, Any]:
    facts: dict[str, Any] = {"thresholds": thresholds.facts()}
    rows = usable(manifest, "val")
    for name, part in ({"val": rows} | sets(manifest)).items():
        facts[name] = scored(part, predicted(part), thresholds)
    return facts


def run_one(recipe: str, data: str, start: str, seed: int, label: str, settings: dict[str, Any]) -> None:
    kind = (recipe, data.replace("official", ""), start.replace("pretrained", ""))
    name = "-".join(part for part in (label, *kind, str(seed)) if part)
    if name in known_runs():
        return
    print(f"=== {name}", flush=True)
    params = params_for(data, seed, name, settings, start)
    run = Run(
        params.model_copy(update={"pretrained_file": params.pretrained_file or str(weights_file(params.backbone))}), CORPUS
    )
    manifest = build_manifest(run, "B")
    if recipe == "ours":
        facts = ours(run, manifest)
    elif same := known_runs().get(name.replace("naive", "ours")):
        facts = naive(run, manifest, same["seconds"])
    else:
        raise SystemExit(f"{name} trains for as long as ours did: run ours for this seed first")
    facts |= {"recipe": recipe, "data": data, "start": start, "seed": seed, "label": label, "settings": settings}
    facts["params"] = run.params.model_dump(exclude={"data_root", "data", "pretrained_file"})
    facts |= {"machine": f"{platform.machine()}, {usable_cores()} cores", "torch": torch.__version__, "timm": timm.__version__}
    if (
        read_json(DOCS / "localization.json").get("floors", {}).keys() != FLOORS.keys()
        and not (BUILD / "floors.json").is_file()
    ):
        write_json(BUILD / "floors.json", floors(manifest))
    if (recipe, data, start, seed, label) == ("ours", "open", "clip", 0, ""):
        draw_masks(run, stored_thresholds(run, "B"))
    write_json(BUILD / f"{name}.json", facts)
    shown = {split: {k: v for k, v in facts[split].items() if not isinstance(v, dict)} for split in ("val", *SETS)}
    print(f"=== {name}: {facts['seconds']} s, {facts['thresholds']}")
    print("\n".join(f"    {split}: {values}" for split, values in shown.items()), flush=True)


# ---- Report ------------------------------------------------------------------------------------------------------------


def known_runs() -> dict[str, dict[str, Any]]:
    """The runs of the last report, and those since."""
    files = [path for path in sorted(BUILD.glob("*.json")) if path.stem != "floors"]
    return read_json(DOCS / "localization.json").get("runs", {}) | {path.stem: read_json(path) for path in files}


def report() -> None:
    runs = known_runs()
    of_floors = read_json(BUILD / "floors.json") or read_json(DOCS / "localization.json").get("floors", {})
    write_json(DOCS / "localization.json", {"runs": runs, "floors": of_floors})
    main_runs = [run for run in runs.values() if not run["label"]]
    machines = "; ".join(sorted({f"{run['machine']}, torch {run['torch']}" for run in runs.values()}))
    parts = ["# Quality of Task B\n", _answer(main_runs, of_floors), _HEAD.format(machines=machines)]
    parts += ["## Targets\n", markdown(_targets(main_runs, of_floors)), "\n## Recipes and floors\n"]
    parts += [markdown(_summary(main_runs, of_floors)), "\n## By method\n", "IoU.\n", markdown(_methods(main_runs))]
    parts += ["\n## After recompression and shrinking\n", "Real pairs, seed 0.\n", markdown(_changes(main_runs))]
    parts += ["\n## Ablations\n", _ABLATIONS, markdown(_ablations([run for run in runs.values() if run["label"]]))]
    write_text(DOCS / "localization.md", "\n".join(parts) + "\n")
    if (BUILD / "masks.png").is_file():
        shutil.copyfile(BUILD / "masks.png", DOCS / "masks.png")
    print(f"wrote {DOCS / 'localization.md'} of {len(runs)} runs")


_APART = {"run_name", "seed", "degrade", "crops_per_image"}  # what says nothing of the recipe


def _of(
    runs: list[dict[str, Any]], recipe: str, split: str, key: str, data: str = "official", start: str = "pretrained"
) -> float:
    members = _members(runs, recipe, data, start)
    return median([run[split][key] for run in members if run.get(split, {}).get(key) is not None])


def _members(runs: list[dict[str, Any]], recipe: str, data: str, start: str) -> list[dict[str, Any]]:
    return [run for run in runs if _kind(run) == (recipe, data, start)]


def _kind(run: dict[str, Any]) -> tuple[str, str, str]:
    return run["recipe"], run.get("data", "official"), run.get("start", "pretrained")


def _title(recipe: str, data: str, start: str) -> str:
    return f"{recipe}, {data} data{', CLIP' if start == 'clip' else ''}"


def _answer(runs: list[dict[str, Any]], of_floors: dict[str, Any]) -> str:
    """What it finds, what it misses and how often it cries wolf, in the numbers of the open protocol."""
    keys = ("pixel_auc", "iou", "auc", "submitted_iou", "submitted_flagged_authentic")
    words: dict[str, Any] = {}
    for split, key in product(SETS, keys):
        words[f"{split}_{key}"] = _of(runs, "ours", split, key, "open", "clip")
        words[f"small_{split}_{key}"] = _of(runs, "ours", split, key, "open")
    for split, key in product(SETS, ("pixel_auc", "iou")):
        values = {name: facts[split][key] for name, facts in of_floors.items() if facts.get(split, {}).get(key) is not None}
        best = max(values, key=lambda name: values[name], default=None)
        words[f"floor_{split}_{key}"] = f"{best} {values[best]:.2f}" if best else "not measured"
    return _ANSWER.format(official_iou=_of(runs, "ours", "simulated", "iou"), **words)


def _targets(runs: list[dict[str, Any]], of_floors: dict[str, Any]) -> pd.DataFrame:
    def of_open(split: str, key: str) -> float:
        return _of(runs, "ours", split, key, "open", "clip")

    best = max((facts["real"]["iou"] for facts in of_floors.values()), default=float("nan"))
    rows = [
        ("real pairs, pixel AUC", of_open("real", "pixel_auc"), "at least", 0.80),
        ("real pairs, mean IoU", of_open("real", "iou"), "at least", 0.30),
        ("real pairs, mean IoU, times the best floor", of_open("real", "iou") / best, "at least", 1.5),
        ("edits, pixel AUC", of_open("edits", "pixel_auc"), "at least", 0.75),
        ("real pairs, image AUC", of_open("real", "auc"), "at least", 0.75),
        ("edits, image AUC", of_open("edits", "auc"), "at least", 0.75),
        ("simulated SP, mean IoU", of_open("simulated", "iou_sp"), "at least", 0.55),
        ("simulated FR, mean IoU", of_open("simulated", "iou_fr"), "at least", 0.51),
        ("simulated SP, mean IoU, official data alone", _of(runs, "ours", "simulated", "iou_sp"), "at least", 0.55),
        ("simulated FR, mean IoU, official data alone", _of(runs, "ours", "simulated", "iou_fr"), "at least", 0.51),
    ]
    changed = [run for run in _members(runs, "ours", "open", "clip") if "changes" in run]
    for name in CHANGES:
        lost = median([1 - run["changes"][name]["iou"] / run["real"]["iou"] for run in changed])
        rows.append((f"real pairs, share of IoU lost after {name}", lost, "at most", 0.33))
    for split in ("real", "edits", "test"):
        name = f"{split}: authentic images with over 1% of pixels flagged, as submitted"
        rows.append((name, of_open(split, "submitted_flagged_authentic"), "at most", 0.10))
    return pd.DataFrame([verdict(*row) for row in rows])


def _changes(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """The real pairs as they are, and after each of ``CHANGES``."""
    rows = []
    for run in (run for run in runs if "changes" in run):
        for name, facts in ({"none": run["real"]} | run["changes"]).items():
            row = {"recipe": _title(*_kind(run)), "change": name}
            rows.append(row | {_COLUMNS[key]: facts[key] for key in ("iou", "submitted_iou", "pixel_auc", "auc", "fpr")})
    return pd.DataFrame(rows)


_COLUMNS = {
    "iou": "IoU",
    "iou_sp": "IoU SP",
    "iou_fr": "IoU FR",
    "iou_all": "IoU all",
    "submitted_iou": "submitted IoU",
    "submitted_iou_all": "submitted IoU all",
    "submitted_flagged_authentic": "submitted flagged",
    "best_pixel_f1": "best pixel F1",
    "pixel_auc": "pixel AUC",
    "flagged_authentic": "flagged",
    "f1": "F1",
    "auc": "AUC",
    "fpr": "FPR",
}


def _summary(runs: list[dict[str, Any]], of_floors: dict[str, Any]) -> pd.DataFrame:
    rows = []
    for split, title in SETS.items():
        for kind in KINDS:
            members = [run for run in _members(runs, *kind) if split in run]
            if members:
                row: dict[str, Any] = {"set": title, "recipe": _title(*kind), "seeds": len(members)}
                recipe, data, start = kind
                row |= {name: _of(runs, recipe, split, key, data, start) for key, name in _COLUMNS.items()}
                for key in ("iou", "pixel_auc"):  # of one run: over photographs
                    ends = members[0][split].get("intervals", {}).get(key)
                    row[f"{_COLUMNS[key]} 95%"] = f"{ends[0]:.2f} to {ends[1]:.2f}" if ends and len(members) == 1 else ""
                rows.append(row)
        for name, facts in of_floors.items():
            row = {"set": title, "recipe": f"floor: {name}", "seeds": 1}
            rows.append(row | {column: facts.get(split, {}).get(key) for key, column in _COLUMNS.items()})
    return pd.DataFrame(rows)


def _methods(runs: list[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for split, title in SETS.items():
        for method in sorted({name for run in runs for name in run.get(split, {}).get("by_method", {})}):
            row = {"set": title, "method": method}
            for kind in KINDS:
                members = [run for run in _members(runs, *kind) if split in run]
                if members:
                    row[_title(*kind)] = median([run[split]["by_method"][method] for run in members])
            rows.append(row)
    return pd.DataFrame(rows)


def _ablations(runs: list[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for run in runs:
        now = params_for(run.get("data", "official"), 0, "now", {}, run.get("start", "pretrained"))
        words = {key: value for key, value in run["settings"].items() if isinstance(value, str)}
        tried = [f"{key}: {value}" for key, value in words.items() if run["params"].get(key) != value]
        differs = tried + differences(run, now, "degrade_b", _APART)
        row = {
            "ablation": run["label"],
            "data": run.get("data", "official"),
            "seed": run["seed"],
            "differs": ", ".join(differs) or "in nothing",
        }
        row |= {f"val {name}": run["val"][key] for key, name in (("iou_sp", "IoU SP"), ("iou_fr", "IoU FR"), ("f1", "F1"))}
        row |= {"val flagged": run["val"]["flagged_authentic"]}
        row |= {"simulated IoU SP": run["simulated"]["iou_sp"], "simulated IoU FR": run["simulated"]["iou_fr"]}
        row |= {f"real {name}": run["real"][key] for key, name in (("iou", "IoU"), ("pixel_auc", "pixel AUC"), ("auc", "AUC"))}
        edits = run.get("edits", {})
        row |= {f"edits {name}": edits.get(key) for key, name in (("iou", "IoU"), ("pixel_auc", "pixel AUC"), ("auc", "AUC"))}
        rows.append(row | {"seconds": run["seconds"]})
    return pd.DataFrame(rows)


_ANSWER = """- **Finds** manipulations of the kinds that it is trained on, on other photographs: with CLIP's ViT-B/16 and
  open data pixel AUC {simulated_pixel_auc:.2f}, mean IoU {simulated_iou:.2f} (a small backbone:
  {small_simulated_pixel_auc:.2f} and {small_simulated_iou:.2f}, and IoU {official_iou:.2f} where its training
  has these kinds alone).
- **Finds in part** manipulations that training has nothing of. Real pairs: pixel AUC {real_pixel_auc:.2f} (best floor:
  {floor_real_pixel_auc}; a small backbone: {small_real_pixel_auc:.2f}), mean IoU {real_iou:.2f} ({floor_real_iou};
  {small_real_iou:.2f}). Edits: pixel AUC {edits_pixel_auc:.2f} ({floor_edits_pixel_auc}; {small_edits_pixel_auc:.2f}), mean
  IoU {edits_iou:.2f} ({floor_edits_iou}; {small_edits_iou:.2f}).
- **Misses**, often, whether an image is manipulated at all: AUC {real_auc:.2f} on real pairs, {edits_auc:.2f} on edits (a
  small backbone: {small_real_auc:.2f} and {small_edits_auc:.2f}). So, with few false alarms, many masks of real
  manipulations are submitted empty: IoU as submitted {real_submitted_iou:.2f} and {edits_submitted_iou:.2f}.
- **Cries wolf**, as submitted, over {real_submitted_flagged_authentic:.0%} of the authentic photographs of the real pairs,
  {edits_submitted_flagged_authentic:.0%} of those of the edits and {test_submitted_flagged_authentic:.0%} of the test's:
  they have over 1% of their pixels flagged. Of the validation photographs at most 10% may be called manipulated.

![Image, truth, probability and decision, from the best mask to the worst](masks.png)

*Masks of the open run on CLIP's ViT-B/16, on forgeries of the built-in sample's photographs, which it has not seen.*
"""
_HEAD = """Made by `make bench-quality`; every run behind it is in [localization.json](localization.json). Machines: {machines}.

Measured on the corpus that [quality.md](quality.md) tells of. *Official* data is the training split of its
`dataset_taskB/TGIF`, 70 photographs whose contents are simulated: a region's new content went through TAEF2, ClearReality4x or
Real-ESRGAN (SP), or the whole image through TAEF2 (FR). *Open* data adds 1,037 photographs as they are, into which training
pastes regions, half of them from 677 synthetic images. Epoch and thresholds are chosen on TGIF's validation split, in the open
protocol with 226 more photographs. `dataset_taskB/validation` holds real inpainting, copy-move and splices,
`dataset_taskB/edits` composites, Photoshop edits and inpainting by diffusion models; training has nothing of either.

*CLIP* is the recipe of `params/clip_localization.yaml`: CLIP's ViT-B/16 stays as it was pretrained, and the branches on it
learn for two epochs; the better one was chosen on 60 of the validation images (`val_limit: 60`). Its weights are those that
[quality.md](quality.md) tells of. Beside the network it counts parts that an image holds twice (`copy_move`): what is a copy
was settled on training photographs, with squares copied within them. All other runs fine-tune `tf_efficientnet_lite0` or what
the ablation names. The *naive* recipe squeezes whole images to 224 pixels and trains a small U-Net on the same backbone for
the same time.

IoU: mean over manipulated images at the stored threshold (*all*: over all images, empty against empty is 1). *Submitted*:
images called authentic have empty masks, as in the archive; the other figures are of the masks alone. *Flagged*: authentic
images with over 1% of their pixels flagged. *Best pixel F1* takes each image's own best threshold. F1, AUC, FPR: of images.
Medians over seeds; 95% intervals of single runs, over photographs. The saliency floor flags what stands out in an image.

Runs without CLIP, and those of the ablations, are of code in which the classifier saw pooled features beside the mask's
evidence, pyramids ended one scale earlier for some images, and the image threshold had the best F1 within the limit on false
alarms. Where training has official data alone, images were looked at in one scale, and thresholds chosen without that limit.
"""
_ABLATIONS = """One run each, most of them shorter than those above. *Differs*: what a run tried or had and the recipe has not
now. Choices were made on the validation split alone, but three: `mask_scales`, of `one scale` and `other pastes`, which differ
in nothing but scales from `photographs` and in `tried`; and what `donors` had over `overview`, and this over `photographs`, on
real pairs and edits. The recipe has the donors, and shrinks squares of images of at least twice `crop_size` alone, since on
small images the larger squares hurt; on edits `donors`, with squares of any image, is ahead of it. `former` are three seeds of
the recipe before an image that an epoch draws several times gave other crops each time and blur no longer darkened. `lite2`, a
backbone of nearly twice the size, differs from `6 epochs` by less than seeds do. `pooled features` is CLIP's recipe before;
what replaced it was chosen by what it did on some of the real pairs and edits. `without copies` is the same recipe, seed 0,
where copies do not count. These runs shared the machine with other work, so their seconds say little.
"""


def main() -> None:
    options = arguments(__doc__, CORPUS, BUILD, data=DATA, start=STARTS)
    if options is None:
        return
    if options.command == "report":
        report()
        return
    for seed, start, data, recipe in product(options.seeds, options.start, options.data, options.recipes):
        if (recipe, start) != ("naive", "clip"):  # the small U-Net needs stages
            run_one(recipe, data, start, seed, options.name, parse_settings(options.set))


if __name__ == "__main__":
    sys.exit(main())
