"""What predicts the images of a run: its trained model, a function of the user's, or the models of other runs together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit, logit

from forensics_lib.data.datasets import InferenceImages, stream
from forensics_lib.device import Machine, compile_where_it_pays
from forensics_lib.images.io import ImageError
from forensics_lib.images.masks import written_mask
from forensics_lib.inference.predict import Prediction, predict_mask, predict_masks, predict_probabilities
from forensics_lib.inference.probabilities import EDGE, calibrated
from forensics_lib.models.checkpoint import load_model
from forensics_lib.models.combined import CombinedModel
from forensics_lib.params import Params
from forensics_lib.run import Run, Thresholds, recorded_run, require_trained, stored_thresholds
from forensics_lib.utils.callables import load_callable, source_of
from forensics_lib.utils.files import home
from forensics_lib.utils.progress import progress

Change = Callable[[np.ndarray], np.ndarray]
WANTED = "a function from an image (H, W, 3) uint8 to a probability, and for Task B to a probability and a mask (H, W)"


class DetectorError(ImageError):
    """A detector of the user's gave no usable answer for an image; the message says what it gave."""


@dataclass(frozen=True)
class FunctionDetector:
    """A function of the user's, named by the parameter ``detector``."""

    name: str
    task: str
    function: Callable[[np.ndarray], Any]

    def predict(self, rows: pd.DataFrame, machine: Machine, change: Change | None, title: str) -> Iterator[Prediction]:
        """The predictions for ``rows`` in order; an image that the function fails on has the reason as its error.

        Raises ``DetectorError`` where it fails on each of them that can be read.
        """
        errors: list[str] = []
        readable = 0
        for sample in progress(stream(InferenceImages(rows, change=change), machine), title, total=len(rows)):
            found = self._prediction(sample, rows)
            readable += "error" not in sample
            errors += [found.error] if found.error and "error" not in sample else []
            if sample["index"] == len(rows) - 1 and 0 < readable == len(errors):
                raise DetectorError(f"no answer for any of {readable} images; the first: {errors[0]}")
            yield found

    def _prediction(self, sample: dict[str, Any], rows: pd.DataFrame) -> Prediction:
        if "error" in sample:
            return Prediction(sample["index"], float("nan"), sample["error"])
        try:
            prob, mask = self.answer(np.asarray(sample["image"]))
        except DetectorError as error:
            return Prediction(sample["index"], float("nan"), f"{rows['path'].iloc[sample['index']]}: {error}")
        return Prediction(sample["index"], prob, mask=mask)

    def answer(self, image: np.ndarray) -> tuple[float, np.ndarray | None]:
        """The checked probability and mask of an image ``(H, W, 3)`` uint8.  Raises ``DetectorError``."""
        try:
            found = self.function(image.copy())
        except Exception as error:
            raise DetectorError(f"detector {self.name} failed: {type(error).__name__}: {error}") from error
        if self.task == "A":
            return self._probability(found), None
        if not isinstance(found, tuple) or len(found) != 2:
            raise DetectorError(f"detector {self.name} gave {type(found).__name__}; expected a probability and a mask")
        return self._probability(found[0]), self._mask(found[1], image.shape[:2])

    def _probability(self, found: Any) -> float:
        try:
            prob = float(found)
        except (TypeError, ValueError):
            raise DetectorError(f"detector {self.name} gave {type(found).__name__}; expected a number in [0, 1]") from None
        if not 0 <= prob <= 1:
            raise DetectorError(f"detector {self.name} gave the probability {prob}; expected a number in [0, 1]")
        return prob

    def _mask(self, found: Any, size: tuple[int, int]) -> np.ndarray:
        mask = np.asarray(found)
        if mask.shape != size:
            raise DetectorError(
                f"detector {self.name} gave a mask of shape {mask.shape} for an image of {size} (height, width)"
            )
        if mask.dtype.kind not in "buif" or not ((mask >= 0) & (mask <= 1)).all():  # NaN are neither
            raise DetectorError(f"detector {self.name} gave a mask with values that are not numbers in [0, 1]")
        return written_mask(mask)

    def prepare(self, machine: Machine, pixels: float) -> None:
        """Nothing: the function looks after itself."""

    def identify(self, digest: Any) -> None:
        """Add what answers depend on to a hash: the name, and the source file of its module."""
        source = source_of(self.name)
        digest.update(self.name.encode() + (source.read_bytes() if source else b""))


@dataclass(frozen=True)
class Ensemble:
    """The models of other runs: the mean of their calibrated log-odds, and of their masks."""

    task: str
    members: list[tuple[Detector, Params, Thresholds]]

    def predict(self, rows: pd.DataFrame, machine: Machine, change: Change | None, title: str) -> Iterator[Prediction]:
        """The predictions for ``rows`` in order."""
        parts = [
            predictions(model, self.task, rows, params, machine, change, f"{title} {number}/{len(self.members)}")
            for number, (model, params, _) in enumerate(self.members, start=1)
        ]
        for found in zip(*parts, strict=True):
            if error := next((one.error for one in found if one.error), None):
                yield Prediction(found[0].index, float("nan"), error)
            else:
                prob, mask = self._mean([(one.prob, one.mask) for one in found])
                yield Prediction(found[0].index, prob, mask=mask)

    def answer(self, image: np.ndarray, machine: Machine) -> tuple[float, np.ndarray | None]:
        """The probability and the mask of an image ``(H, W, 3)`` uint8, Task B."""
        return self._mean([answer(model, image, params, machine) for model, params, _ in self.members])

    def _mean(self, found: Sequence[tuple[float, np.ndarray | None]]) -> tuple[float, np.ndarray | None]:
        pairs = zip(found, self.members, strict=True)
        sure = [calibrated(np.array(prob), thresholds) for (prob, _), (_, _, thresholds) in pairs]
        odds = logit(np.clip(sure, EDGE, 1 - EDGE))  # finite: no member outvotes all others
        masks = [mask.astype(np.float32) for _, mask in found if mask is not None]
        return float(expit(np.mean(odds))), written_mask(np.mean(masks, axis=0)) if masks else None

    def prepare(self, machine: Machine, pixels: float) -> None:
        """Compile the members for so many pixels, where that pays."""
        for model, _, _ in self.members:
            prepare(model, machine, pixels)

    def identify(self, digest: Any) -> None:
        """Add what answers depend on to a hash: the members, their parameters of inference and calibrations."""
        for model, params, thresholds in self.members:
            identify(model, digest)
            digest.update(repr([params.of_prediction(self.task), thresholds.temperature, thresholds.intercept]).encode())


Detector = CombinedModel | FunctionDetector | Ensemble


def load_detector(run: Run, task: str) -> Detector:
    """What predicts for a task of a run, ready to use.

    Raises ``FileNotFoundError`` where it, or a member of an ensemble, is not trained, ``ValueError`` where a detector of the
    user's cannot be loaded, and as ``load_model`` does.
    """
    if run.params.detector:
        name = run.params.detector
        return FunctionDetector(name, task, load_callable(name, "detector", f"wanted is {WANTED}"))
    if run.params.ensemble:
        return Ensemble(task, [_member(member, task) for member in members(run, task)])
    return load_model(run.finetuned_model(task), task)[0]


def members(run: Run, task: str) -> list[Run]:
    """The runs that an ensemble averages, with the parameters of their trainings and thresholds.

    Raises ``FileNotFoundError`` where one is not trained for the task.
    """
    found = []
    for name in run.params.ensemble or []:
        require_trained(Run(Params(run_name=name), home()), task)
        member = recorded_run(name, task)
        machine = run.params.model_dump(include={"device", "precision", "workers"})
        found.append(Run(member.params.model_copy(update=machine), member.data))
    return found


def common_rows(run: Run, task: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The validation ``rows``, of an ensemble those that each member validated on, and so none trained on.

    Raises ``ValueError`` where that leaves none of a class.
    """
    common = np.ones(len(rows), bool)
    for member in members(run, task):
        common &= rows["path"].isin(pd.read_csv(member.val_probs(task), usecols=["path"])["path"]).to_numpy()
    if rows.loc[common, "label"].nunique() < rows["label"].nunique():
        raise ValueError(
            f"the members of {run.name} ({', '.join(run.params.ensemble or [])}) have no validation images of both classes in "
            "common: train them with the same validation data"
        )
    if not common.all():
        print(f"{(~common).sum()} of {len(rows)} validation images are left out: not every member validated on them")
    return rows[common].reset_index(drop=True)


def _member(run: Run, task: str) -> tuple[Detector, Params, Thresholds]:
    return load_detector(run, task), run.params, stored_thresholds(run, task)


def predictions(
    model: Detector,
    task: str,
    rows: pd.DataFrame,
    params: Params,
    machine: Machine,
    change: Change | None = None,
    title: str | None = None,
) -> Iterator[Prediction]:
    """The predictions for ``rows`` in order, of whatever predicts; arguments are those of ``predict_masks``."""
    title = title or ("probabilities" if task == "A" else "masks")
    if not isinstance(model, CombinedModel):
        return model.predict(rows, machine, change, title)
    predict = predict_probabilities if task == "A" else predict_masks
    return predict(model, rows, params, machine, change, title)


def answer(model: Detector, image: np.ndarray, params: Params, machine: Machine) -> tuple[float, np.ndarray]:
    """Task B: the probability, not calibrated, and the mask of an image ``(H, W, 3)`` uint8, of whatever predicts."""
    if isinstance(model, CombinedModel):
        return predict_mask(model.to(machine.device), image, params, machine)
    prob, mask = model.answer(image) if isinstance(model, FunctionDetector) else model.answer(image, machine)
    if mask is None:
        raise ValueError("masks need a model of Task B")
    return prob, mask


def prepare(model: Detector, machine: Machine, pixels: float) -> None:
    """Move a model to its device, and compile it where that pays for so many pixels."""
    if isinstance(model, CombinedModel):
        compile_where_it_pays(model.to(machine.device).to(memory_format=torch.channels_last), pixels)
    else:
        model.prepare(machine, pixels)


def identify(model: Detector, digest: Any) -> None:
    """Add what the answers of a model depend on to a hash of ``hashlib``."""
    if not isinstance(model, CombinedModel):
        model.identify(digest)
        return
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
