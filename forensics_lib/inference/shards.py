"""Inference on the test images, in shards, so that a stopped inference goes on where it was."""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forensics_lib.data.headers import look
from forensics_lib.data.layouts import mask_names
from forensics_lib.data.manifest import build_test_manifest, data_fingerprint
from forensics_lib.device import Machine, choose_machine
from forensics_lib.images.headers import read_header
from forensics_lib.images.io import ImageError
from forensics_lib.images.masks import load_mask, save_mask
from forensics_lib.inference.detectors import Detector, identify, load_detector, predictions, prepare
from forensics_lib.inference.predict import inference_settings, other_settings
from forensics_lib.inference.probabilities import (
    FALLBACK_PROB,
    BrokenModelError,
    calibrated,
    check_finite,
    round_probs,
    warn_of_ties,
)
from forensics_lib.models.checkpoint import read_checkpoint
from forensics_lib.params import settings_text
from forensics_lib.run import Run, require_same_kind, require_trained, stored_thresholds
from forensics_lib.utils.cores import usable_cores
from forensics_lib.utils.files import WriteError, atomic_write, is_main, read_json, write_csv
from forensics_lib.utils.locks import exclusive
from forensics_lib.utils.processes import launch, launched, rank, should_launch, wait_for_all, world

SHARD_IMAGES = {"A": 1024, "B": 64}  # at most, in a shard
SHARDS = 32  # at least, where there are as many images, so that several processes get equal shares
WRITERS, WAITING = 4, 16  # threads that compress masks, outside Python's lock, and masks at most that wait for them
MASK_BYTES = 1.5  # per pixel of a compressed mask; measured: 1.3 on the sample, where hardly any pixel is exactly 0


class InferenceError(RuntimeError):
    """An inference cannot start, or its shards are of no use; the message says why and what to do."""


def infer(run: Run, task: str) -> pd.DataFrame:
    """Predict every image of the test folder; writes ``_test_probs.csv``, and for Task B the masks.

    An image that cannot be read gets probability 0.5 and an all-zero mask (of its declared size where its header can be
    read, else 1 x 1), because a submission must hold every test image.  Finished shards in the run's folder are kept; those
    of another model, other parameters or other images are removed.  ``processes`` above 1 starts that many processes;
    another inference of the same task and run waits, and then takes the shards of this one.

    Args:
        run: a trained and evaluated run, from ``open_run``.
        task: "A" or "B".

    Returns:
        One row per test image: image_id (file name), prob (calibrated, in [0, 1]), error (None or the reason) and path.

    Raises:
        FileNotFoundError: the task is not trained and evaluated.
        InferenceError: thresholds were chosen with other parameters of inference, or shards do not fit the test images.
        BrokenModelError: predictions are not finite.
        WriteError: the disk has no room for the masks.
    """
    with only_inference(run, task):
        return _infer(run, task)


def _infer(run: Run, task: str) -> pd.DataFrame:
    require_trained(run, task)
    require_same_kind(run, task)
    thresholds = stored_thresholds(run, task)
    _require_same_settings(run, task, read_checkpoint(run.finetuned_model(task)) if run.params.trains else None)
    model = load_detector(run, task)
    if should_launch(run.params.processes):
        launch(run.params.processes, "infer", "--params", str(run.write_params()), "--tasks", task)
    table = _predicted(run, task, model)
    failed = table["error"].notna()
    raw = table["prob"].to_numpy()
    table["prob"] = round_probs(np.where(failed, FALLBACK_PROB, calibrated(raw, thresholds)))
    warn_of_ties(raw[~failed], table.loc[~failed, "prob"].to_numpy())
    table.insert(0, "image_id", [Path(path).name for path in table["path"]])
    if failed.any():
        print(f"{failed.sum()} test image(s) could not be read and get probability {FALLBACK_PROB}:")
        print("\n".join(f"  {reason}" for reason in table.loc[failed, "error"].head(10)))
    facts = {"thresholds": thresholds.facts(), "test_folder": str(run.test_folder(task))}
    run.record(**{f"task{task}_inferred": facts | inference_settings(run.params, task)})
    run.record(**{f"task{task}_unreadable_test": table.loc[failed, "image_id"].tolist()})
    if is_main():
        write_csv(run.test_probs(task), table[["image_id", "prob"]])
    wait_for_all()
    return table[["image_id", "prob", "error", "path"]]


def _predicted(run: Run, task: str, model: Detector) -> pd.DataFrame:
    """The predictions for all test images, not yet calibrated: path, prob and error, from shards done before or now."""
    rows = build_test_manifest(run, task)
    machine = choose_machine(run.params)
    print(f"Task {task}: {len(rows)} test images on {machine}")
    shards = Shards(run, task, rows, _key(run, task, model, rows))
    shards.prepare()
    missing = shards.missing()
    if missing:
        prepare(model, machine, _pixels(run, task, rows))
    shards.complete(missing, model, machine)
    wait_for_all()
    return shards.merged()


def _require_same_settings(run: Run, task: str, content: dict[str, Any] | None) -> None:
    """Raise ``InferenceError`` where thresholds were chosen with other parameters of inference than this run's.

    ``content`` is the checkpoint's, None for a run without one.  Another precision is only noted: a model may be trained on a
    GPU and used on a CPU.
    """
    kept, now = read_json(run.thresholds)[task], inference_settings(run.params, task)
    again = f"run {'notebook 02' if task == 'A' else 'notebook 03'} or 'train' of this run again"
    if content is not None and "thresholds" not in content:
        raise InferenceError(
            f"{run.finetuned_model(task)} was trained after the thresholds in {run.thresholds} were chosen: {again}, which "
            "chooses them for it"
        )
    chosen = kept.get("inference") or (content or {}).get("inference") or {}
    there, here = other_settings(chosen, run.params, task)
    if here:
        found = "\n".join(f"  {name}: {there[name]} there, {value} here" for name, value in here.items())
        raise InferenceError(
            f"the Task {task} thresholds of run {run.name} were chosen with other parameters of inference:\n{found}\n"
            f"Give the same ({settings_text(there)}), or {again} with the new ones: what is trained stays, thresholds are "
            "chosen anew."
        )
    precision = kept.get("precision", now["precision"])
    if precision != now["precision"]:
        print(f"note: thresholds were chosen in {precision}, this machine predicts in {now['precision']}: probabilities may")
        print(f"      differ by a hundredth; to choose thresholds in {now['precision']}, {again}")


def _pixels(run: Run, task: str, rows: pd.DataFrame) -> float:
    """Pixels that the model has to process: of the crops, or of the images."""
    if task == "B":
        return float((rows["width"] * rows["height"]).sum())
    return len(rows) * run.params.crops_per_image * run.params.crop_size**2


def _key(run: Run, task: str, model: Detector, rows: pd.DataFrame) -> str:
    """A hash of the model's weights, the parameters that predictions depend on, and the test images."""
    digest = hashlib.sha256()
    identify(model, digest)
    digest.update(repr([run.params.of_prediction(task), run.params.precision]).encode())
    digest.update(data_fingerprint(rows).encode())
    digest.update(look(rows["path"].tolist())[:, 1].tobytes())  # when they were written: others may have the same size
    return digest.hexdigest()[:16]


class Shards:
    """The test images of a task in equal shards, each written when all its images are predicted.

    They depend on the number of images alone, so that an inference can go on with another number of processes.
    """

    def __init__(self, run: Run, task: str, rows: pd.DataFrame, key: str) -> None:
        self.run, self.task, self.rows = run, task, rows
        self.folder = run.folder / "shards" / f"task{task}-{key}"
        self.size = int(np.clip(len(rows) // SHARDS, 1, SHARD_IMAGES[task]))
        self.masks = mask_names(rows["path"]) if task == "B" else {}

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.parquet"

    def part(self, number: int) -> pd.DataFrame:
        return self.rows.iloc[number * self.size : (number + 1) * self.size]

    def done(self, number: int) -> bool:
        """Whether the predictions of a shard exist, and its masks."""
        masks = [self.run.masks / self.masks[Path(path).name] for path in self.part(number)["path"]] if self.masks else []
        return self.file(number).is_file() and all(path.is_file() for path in masks)

    def prepare(self) -> None:
        """Remove the results of other inferences: until this one is complete there is no result."""
        if is_main():
            self.run.test_probs(self.task).unlink(missing_ok=True)
            for other in self.folder.parent.glob(f"task{self.task}-*"):
                if other != self.folder:
                    shutil.rmtree(other)
            if self.task == "B" and not self.folder.is_dir():
                for mask in self.run.masks.glob("*.npz"):
                    mask.unlink()
            self.folder.mkdir(parents=True, exist_ok=True)
        wait_for_all()

    def missing(self) -> list[int]:
        """The shards that are not done."""
        return [number for number in range(len(self)) if not self.done(number)]

    def complete(self, missing: list[int], model: Detector, machine: Machine) -> None:
        """Predict this process's share of the ``missing`` shards."""
        if self.task == "B":
            self._check_space(missing)
        if 0 < len(missing) < len(self):
            print(f"{len(self) - len(missing)} of {len(self)} shards are done already")
        wait_for_all()  # all have seen the same files before one of them writes
        mine = missing[rank() :: world()]
        if not mine:
            return
        rows = pd.concat([self.part(number) for number in mine])
        with ThreadPoolExecutor(min(WRITERS, usable_cores())) as pool:
            written: deque[Future] = deque()
            lines = self._lines(rows, model, machine, pool, written)
            for number in mine:
                part = pd.DataFrame(islice(lines, len(self.part(number))), columns=["path", "prob", "error"])
                check_finite(part["path"], part["prob"], part["error"])
                while written:
                    written.popleft().result()
                with atomic_write(self.file(number)) as temporary:
                    part.astype({"error": "string"}).to_parquet(temporary)

    def _check_space(self, missing: list[int]) -> None:
        """Raise ``WriteError`` where the disk has no room for the masks of these shards."""
        rows = pd.concat([self.part(number) for number in missing]) if missing else self.rows[:0]
        needed = int((rows["width"] * rows["height"]).sum() * MASK_BYTES)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise WriteError(
                f"{len(rows)} masks need about {needed:,} bytes in {self.run.masks}, where {free:,} are free: make room, "
                "or put outputs elsewhere (FORENSICS_HOME); the same command goes on"
            )

    def _lines(
        self, rows: pd.DataFrame, model: Detector, machine: Machine, pool: Executor, written: deque[Future]
    ) -> Iterator[dict[str, Any]]:
        """The line of each image; its mask is compressed and ``written`` by the pool while the model goes on."""
        for found in predictions(model, self.task, rows, self.run.params, machine):
            path = Path(rows["path"].iloc[found.index])
            if self.task == "B" and (found.error or np.isfinite(found.prob)):
                mask = np.zeros(_declared_size(path), np.float16) if found.mask is None else found.mask
                if len(written) >= WAITING:
                    written.popleft().result()
                written.append(pool.submit(save_mask, self.run.masks / self.masks[path.name], mask))
            yield {"path": str(path), "prob": found.prob, "error": found.error}

    def merged(self) -> pd.DataFrame:
        """All predictions in image order.  Raises ``InferenceError`` where they do not fit the images or are not finite."""
        table = pd.concat([pd.read_parquet(self.file(number)) for number in range(len(self))], ignore_index=True)
        if table["path"].tolist() != self.rows["path"].tolist():
            raise InferenceError(
                f"the shards in {self.folder} hold {len(table)} images, {self.run.test_folder(self.task)} holds "
                f"{len(self.rows)}, and they differ; remove {self.folder} and infer again"
            )
        table = table.astype({"error": object}).replace({"error": {pd.NA: None}})
        try:
            check_finite(table["path"], table["prob"], table["error"])
        except BrokenModelError as error:
            raise InferenceError(f"{error}. The shards in {self.folder} hold such answers: remove it and infer again") from None
        return table


def _declared_size(path: Path) -> tuple[int, int]:
    try:
        header = read_header(path)
        return header.height, header.width
    except ImageError:
        return 1, 1


def mask_statistics(run: Run, results: pd.DataFrame) -> str:
    """A summary of the written masks in words, for notebooks: nbval compares text, not pictures."""
    masks = [(path, load_mask(run.masks / f"{Path(path).stem}.npz")) for path in results.loc[results["error"].isna(), "path"]]
    own_size = sum(mask.shape == (header.height, header.width) for path, mask in masks for header in [read_header(Path(path))])
    in_range = sum(bool((mask >= 0).all() and (mask <= 1).all()) for _, mask in masks)
    kinds = ", ".join(sorted({str(mask.dtype) for _, mask in masks}))
    return f"{len(masks)} masks, {kinds}; {own_size} of their image's own size, {in_range} with all values in [0, 1]"


@contextmanager
def only_inference(run: Run, task: str) -> Iterator[None]:
    """Within the block no other process, or group of them, predicts the test images of this task of this run."""
    held = f"Task {task} of run {run.name} is being predicted by another process: waiting for it"
    with ExitStack() as stack:
        if is_main() and not launched():  # the process that launched others holds the lock for them
            stack.enter_context(exclusive(run.folder / "shards" / f"task{task}.lock", held))
        wait_for_all()
        yield
