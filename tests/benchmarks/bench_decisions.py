"""How a trained model of Task A decides: which crops it looks at, how their answers are joined, and how far they hold.

    python tests/benchmarks/bench_decisions.py DATA CHECKPOINT

``CHECKPOINT`` is a finetuned model that ``bench_quality.py run`` left, ``DATA`` what it was trained with (constrained, open or
modern).  Leaves ``build/quality/decisions/DATA.json``, which ``bench_quality.py report`` takes into docs/quality.md.  Crops and
joins are compared on the validation images alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from bench_quality import BUILD, CORPUS, DATA, params_for, sets
from scipy.special import expit
from scipy.stats import binomtest

from forensics_lib.data.manifest import build_manifest
from forensics_lib.device import Machine, choose_machine
from forensics_lib.evaluation.metrics import best_f1_threshold, rank_auc
from forensics_lib.images.crops import seen_whole
from forensics_lib.inference.predict import predict_probabilities
from forensics_lib.models.checkpoint import load_model
from forensics_lib.models.combined import CombinedModel
from forensics_lib.params import Params
from forensics_lib.reports.pictures import CHANGES
from forensics_lib.run import Run
from forensics_lib.utils.files import write_json

ALL = 200  # more crops than any image of the corpus has
SMALL = 320  # pixels: images whose longer side is shorter are scored apart; none has more than 512
Join = Callable[[np.ndarray], float]


def _random(margins: np.ndarray, count: int) -> float:
    return float(np.random.default_rng(len(margins)).permutation(margins)[:count].mean())


def _trimmed(margins: np.ndarray) -> float:
    """The mean without the lowest and the highest quarter."""
    cut = len(margins) // 4
    return float(np.sort(margins)[cut : len(margins) - cut].mean())


JOINS: dict[str, tuple[int, Join]] = {  # crops asked for, and what makes one number of their logit margins
    "the centre": (1, np.mean),
    "centre and most textured, 3": (3, np.mean),
    "centre and most textured, 5": (5, np.mean),
    "centre and most textured, 10": (10, np.mean),
    "any 10": (ALL, partial(_random, count=10)),
    "all of the grid": (ALL, np.mean),
    "10, median": (10, np.median),
    "10, trimmed mean": (10, _trimmed),
    "10, mean of probabilities": (10, lambda margins: float(expit(margins).mean())),
    "10, highest": (10, np.max),
    "10, mean of the three highest": (10, lambda margins: float(np.sort(margins)[-3:].mean())),
}


class Asked:
    """A model's logit margins of images."""

    def __init__(self, model: CombinedModel, params: Params, machine: Machine) -> None:
        self.model, self.params, self.machine = model, params, machine

    def margins(self, rows: pd.DataFrame, crops: int, change: Callable | None = None) -> list[np.ndarray]:
        """The margins of each image's crops, in the order of ``chosen_crops``."""
        params = self.params.model_copy(update={"crops_per_image": crops})
        found = predict_probabilities(self.model, rows, params, self.machine, change)
        return [np.array(one.margins) for one in found]

    def probs(self, rows: pd.DataFrame, change: Callable | None = None) -> np.ndarray:
        return np.array([one.prob for one in predict_probabilities(self.model, rows, self.params, self.machine, change)])


def crops_and_joins(asked: Asked, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """AUC of the ways to choose and to join crops, and how many crops an image costs."""
    native = asked.margins(rows, ALL)
    shrunk = asked.margins(rows, 3, partial(seen_whole, size=asked.params.crop_size))
    counts, of_shrunk = (np.array([len(margins) for margins in found]) for found in (native, shrunk))
    small = rows[["width", "height"]].max(axis=1).to_numpy() < SMALL
    labels = rows["label"].to_numpy(int)
    ways = {
        name: ([join(margins[:count]) for margins in native], np.minimum(counts, 10 if name == "any 10" else count))
        for name, (count, join) in JOINS.items()
    }
    views = np.array([margins.mean() for margins in shrunk])
    ways["the image shrunk to a crop's height, 3"] = views, of_shrunk
    ways["10 native and 3 shrunk, half each"] = (
        ways["centre and most textured, 10"][0] + views,
        np.minimum(counts, 10) + of_shrunk,
    )
    found = []
    for name, (scores, looked) in ways.items():
        row = {"crops": name, "crops per image": round(float(looked.mean()), 1), "AUC": rank_auc(labels, np.array(scores))}
        row |= {f"AUC below {SMALL} pixels": rank_auc(labels[small], np.array(scores)[small])}
        found.append(row | {f"AUC from {SMALL} pixels on": rank_auc(labels[~small], np.array(scores)[~small])})
    return found


def alarms(rows: pd.DataFrame, called: np.ndarray) -> list[dict[str, Any]]:
    """Photographs called synthetic by source, with Wilson's 95% interval."""
    found = []
    for source, part in pd.Series(called[rows["label"] == 0]).groupby(rows.loc[rows["label"] == 0, "source"].to_numpy()):
        low, high = binomtest(int(part.sum()), len(part)).proportion_ci(method="wilson")
        found.append({"source": source, "photographs": len(part), "rate": float(part.mean()), "from": low, "to": high})
    return found


def unsure(asked: Asked, rows: pd.DataFrame, threshold: float) -> dict[str, Any]:
    """The share of images whose decision a recompression or a shrinking turns, and the accuracy of these and of the others."""
    called = asked.probs(rows) >= threshold
    turned = np.zeros(len(rows), bool)
    for change in CHANGES.values():
        turned |= (asked.probs(rows, change) >= threshold) != called
    right = called == (rows["label"].to_numpy(int) == 1)
    facts = {"recall": called[rows["label"] == 1].mean(), "unsure": turned.mean()}
    facts |= {"right if sure": right[~turned].mean(), "right if unsure": right[turned].mean()}
    return {key: float(value) for key, value in facts.items()} | {"alarms": alarms(rows, called)}


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in DATA:
        raise SystemExit(__doc__)
    data, checkpoint = sys.argv[1], Path(sys.argv[2])
    params = params_for(data, "pretrained", 0, f"decisions-{data}", {})
    asked = Asked(load_model(checkpoint, "A")[0], params, choose_machine(params))
    found = sets(build_manifest(Run(params, CORPUS), "A"))
    labels, probs = found["val"]["label"].to_numpy(int), asked.probs(found["val"])
    facts: dict[str, Any] = {"joins": crops_and_joins(asked, found["val"])} if data == "constrained" else {}
    facts["sets"] = {name: unsure(asked, rows, best_f1_threshold(labels, probs)) for name, rows in found.items()}
    write_json(BUILD / "decisions" / f"{data}.json", facts)
    print(pd.DataFrame(facts.get("joins", [])).to_string(), {name: found["unsure"] for name, found in facts["sets"].items()})


if __name__ == "__main__":
    main()
