"""The test images: a probability of each and for Task B a mask, in shards that a stopped inference need not do again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from forensics_lib.data.layouts import mask_names
from forensics_lib.data.manifest import build_test_manifest, data_fingerprint
from forensics_lib.device import Machine, choose_machine, compile_where_it_pays
from forensics_lib.images.headers import read_header
from forensics_lib.images.io import ImageError
from forensics_lib.images.masks import load_mask, save_mask
from forensics_lib.inference.predict import inference_settings, predict_masks, predict_probabilities
from forensics_lib.inference.probabilities import FALLBACK_PROB, BrokenModelError, calibrated, check_finite, round_probs
from forensics_lib.models.checkpoint import load_model
from forensics_lib.models.combined import CombinedModel
from forensics_lib.params import settings_text
from forensics_lib.run import Run, require_same_kind, require_trained, stored_thresholds
from forensics_lib.utils.files import WriteError, atomic_write, is_main, read_json, write_csv
from forensics_lib.utils.locks import exclusive
from forensics_lib.utils.processes import launch, launched, rank, should_launch, wait_for_all, world

SHARD_IMAGES = {"A": 1024, "B": 64}  # at most, in a shard
SHARDS = 32  # wanted at least, so that several processes get equal shares
MASK_BYTES = 1.5  # for a pixel of a compressed mask; measured: 1.3 on the sample, where hardly any pixel is exactly 0


class InferenceError(RuntimeError):
    """What an inference needs or found does not fit together; the message says what and what to do."""


def infer(run: Run, task: str) -> pd.DataFrame:
    """Predict every image of the test folder; writes ``_test_probs.csv``, and for Task B the masks.

    An image that cannot be read gets ``FALLBACK_PROB`` and, for Task B, an all-zero mask (of its declared size where its
    header can be read, else 1 x 1): no test image may be missing from a submission.  Shards in the run's folder hold what
    is done; those of another model, other parameters or other images are removed.  With ``processes`` above 1 that many
    processes share the work; another inference of the same task and run waits, then takes up what this one leaves.
    Returns image_id, prob, error and path.  Raises ``FileNotFoundError`` where the task is not trained, ``InferenceError``
    where its thresholds were chosen with other parameters of inference.
    """
    with only_inference(run, task):
        return _infer(run, task)


def _infer(run: Run, task: str) -> pd.DataFrame:
    require_trained(run, task)
    require_same_kind(run, task)
    thresholds = stored_thresholds(run, task)
    if "temperature" not in thresholds:
        raise InferenceError(
            f"{run.thresholds} names no temperature for Task {task}: run the training notebook of this run again"
        )
    model, content = load_model(run.finetuned_model(task), task)
    _require_same_settings(run, task, content)
    if should_launch(run.params.processes):
        launch(run.params.processes, "infer", "--params", str(run.write_params()), "--tasks", task)
    rows = build_test_manifest(run, task)
    machine = choose_machine(run.params)
    print(f"Task {task}: {len(rows)} test images on {machine}")
    shards = Shards(run, task, rows, _key(run, model, rows))
    shards.prepare()
    missing = shards.missing()
    if missing:
        model = model.to(machine.device, memory_format=torch.channels_last)
        compile_where_it_pays(model, _pixels(run, task, rows))
    shards.complete(missing, model, machine)
    wait_for_all()
    table = shards.merged()
    failed = table["error"].notna()
    table["prob"] = calibrated(table["prob"].to_numpy(), thresholds)
    table["prob"] = table["prob"].where(~failed, FALLBACK_PROB)
    if failed.any():
        print(f"{failed.sum()} test image(s) could not be read and get probability {FALLBACK_PROB}:")
        print("\n".join(f"  {reason}" for reason in table.loc[failed, "error"].head(10)))
    facts = {"thresholds": thresholds, "test_folder": str(run.test_folder(task))}
    run.record(**{f"task{task}_inferred": facts | inference_settings(run.params, task)})
    run.record(**{f"task{task}_unreadable_test": [Path(path).name for path in table.loc[failed, "path"]]})
    table["prob"] = round_probs(table["prob"])
    table.insert(0, "image_id", [Path(path).name for path in table["path"]])
    if is_main():
        write_csv(run.test_probs(task), table[["image_id", "prob"]])
    wait_for_all()
    return table[["image_id", "prob", "error", "path"]]


def _require_same_settings(run: Run, task: str, content: dict[str, Any]) -> None:
    """Raise ``InferenceError`` where thresholds were chosen with other parameters of inference than this run's.

    ``content`` is the checkpoint's.  Precision is of the machine and may differ, since a model may be trained on a GPU and
    used on a CPU: it is only said.
    """
    kept, now = read_json(run.thresholds)[task], inference_settings(run.params, task)
    again = f"run {'notebook 02' if task == 'A' else 'notebook 03'} or 'train' of this run again"
    if "thresholds" not in content:
        raise InferenceError(
            f"{run.finetuned_model(task)} was trained after the thresholds in {run.thresholds} were chosen: {again}, which "
            "chooses them for it"
        )
    chosen = kept.get("inference") or content.get("inference") or {}
    wanted = now["inference"] | {"tile_overlap": run.params.tile_overlap}  # which earlier versions could change
    names = [name for name, value in wanted.items() if name in chosen and chosen[name] != value]
    if names:
        found = "\n".join(f"  {name}: {chosen[name]} there, {wanted[name]} here" for name in names)
        same = settings_text({name: chosen[name] for name in names})
        raise InferenceError(
            f"the Task {task} thresholds of run {run.name} were chosen with other parameters of inference:\n{found}\n"
            f"Give the same ({same}), or {again} with the new ones: what is trained stays, thresholds are chosen anew."
        )
    precision = kept.get("precision", now["precision"])
    if precision != now["precision"]:
        print(f"note: thresholds were chosen in {precision}, this machine predicts in {now['precision']}: probabilities may")
        print(f"      differ by a hundredth; to choose thresholds in {now['precision']}, {again}")


def _pixels(run: Run, task: str, rows: pd.DataFrame) -> float:
    """How many pixels go through the model: of the crops, or of the images."""
    if task == "B":
        return float((rows["width"] * rows["height"]).sum())
    return len(rows) * run.params.crops_per_image * run.params.crop_size**2


def _key(run: Run, model: CombinedModel, rows: pd.DataFrame) -> str:
    """Changes with the model's weights, with a parameter that predictions depend on, and with the test images."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    digest.update(repr([run.params.of_prediction(model.config["task"]), run.params.precision]).encode())
    digest.update(data_fingerprint(rows).encode())
    return digest.hexdigest()[:16]


class Shards:
    """The test images of a task in equal parts: a part's answers are written when all of them are there.

    The parts follow from the number of images alone, so that an inference can go on with another number of processes.
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
        """Whether a part's answers are there, and its masks."""
        masks = [self.run.masks / self.masks[Path(path).name] for path in self.part(number)["path"]] if self.masks else []
        return self.file(number).is_file() and all(path.is_file() for path in masks)

    def prepare(self) -> None:
        """Remove what another inference left: until this one is complete there is no result."""
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
        """The parts that are not done."""
        return [number for number in range(len(self)) if not self.done(number)]

    def complete(self, missing: list[int], model: CombinedModel, machine: Machine) -> None:
        """Do this process's share of the ``missing`` parts."""
        if self.task == "B":
            self._check_space(missing)
        if 0 < len(missing) < len(self):
            print(f"{len(self) - len(missing)} of {len(self)} shards are done already")
        wait_for_all()  # all have seen the same before one of them writes
        mine = missing[rank() :: world()]
        if not mine:
            return
        rows = pd.concat([self.part(number) for number in mine])
        answers = self._answers(rows, model, machine)
        for number in mine:
            part = pd.DataFrame(islice(answers, len(self.part(number))), columns=["path", "prob", "error"])
            check_finite(part["path"], part["prob"], part["error"])
            with atomic_write(self.file(number)) as temporary:
                part.astype({"error": "string"}).to_parquet(temporary)

    def _check_space(self, missing: list[int]) -> None:
        """Raise ``WriteError`` where the disk has no room for the masks of these parts."""
        rows = pd.concat([self.part(number) for number in missing]) if missing else self.rows[:0]
        needed = int((rows["width"] * rows["height"]).sum() * MASK_BYTES)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise WriteError(
                f"{len(rows)} masks need about {needed:,} bytes in {self.run.masks}, where {free:,} are free: make room, "
                "or put outputs elsewhere (FORENSICS_HOME); the same command goes on"
            )

    def _answers(self, rows: pd.DataFrame, model: CombinedModel, machine: Machine) -> Iterator[dict[str, Any]]:
        paths, params = rows["path"].tolist(), self.run.params
        if self.task == "A":
            for answer in predict_probabilities(model, rows, params, machine):
                yield {"path": paths[answer.index], "prob": answer.prob, "error": answer.error}
            return
        for answer in predict_masks(model, rows, params, machine):
            path = Path(paths[answer.index])
            mask = np.zeros(_declared_size(path), np.float16) if answer.mask is None else answer.mask
            if answer.error or np.isfinite(answer.prob):
                save_mask(self.run.masks / self.masks[path.name], mask)
            yield {"path": str(path), "prob": answer.prob, "error": answer.error}

    def merged(self) -> pd.DataFrame:
        """All answers in the order of the images.  Raises ``InferenceError`` where they are not the images' or not finite."""
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
    """What the written masks are, in words: nbval compares text, not pictures."""
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
        if is_main() and not launched():  # who launched others holds the lock for them
            stack.enter_context(exclusive(run.folder / "shards" / f"task{task}.lock", held))
        wait_for_all()
        yield
