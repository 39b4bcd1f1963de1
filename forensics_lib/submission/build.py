"""Building the challenge's archives from the files of a run."""

from __future__ import annotations

import filecmp
import io
import itertools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forensics_lib.data.layouts import mask_names
from forensics_lib.images.masks import MASK_KEY, load_mask
from forensics_lib.inference.probabilities import round_probs
from forensics_lib.run import Run, Thresholds, require_same_kind, stored_thresholds
from forensics_lib.submission.validate import HEADERS, SCORES, SHOWN_FAULTS, Validation, validate_submission
from forensics_lib.utils.files import atomic_write, decimal_text, home, read_json, update_json
from forensics_lib.utils.locks import exclusive
from forensics_lib.utils.progress import progress

_EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed time in archives: the same results give the same bytes


class SubmissionError(ValueError):
    """The submission would not be valid; the message lists its faults."""


def archive_path(run: Run, task: str) -> Path:
    """Where a task's archive goes; that of a sample run has ``sample`` in its name."""
    parts, ending = [run.params.team, run.params.run_type], ".zip" if run.params.edition == 2025 else ".csv"
    if task == "B":
        parts, ending = [run.params.team, "localization_masks", *_open(run)], ".zip"
    return run.submission / f"{'_'.join([*parts, *_sample(run)])}{ending}"


def scores_path(run: Run) -> Path:
    """Where the copy of ``scores.csv`` beside the Task B archive goes."""
    return run.submission / f"{'_'.join(['scores', *_open(run), *_sample(run)])}.csv"


def _open(run: Run) -> list[str]:
    return ["open"] if run.params.run_type == "open" else []


def _sample(run: Run) -> list[str]:
    return ["sample"] if run.sample else []


def build_submission(run: Run, task: str) -> Validation:
    """Build and validate a task's archive; a file under its name is always valid.

    A Task B archive holds an all-zero mask for every image with label 0: nothing was detected there.  Where another run's
    archive has the name, that one is kept under a name with its run.

    Args:
        run: a run whose test images are predicted.
        task: "A" or "B".

    Returns:
        What the validator found, with the path of the archive.

    Raises:
        SubmissionError: the archive would have faults, or thresholds are newer than the predictions.
        FileNotFoundError: there are no predictions, thresholds or masks.
        ValueError: the run was trained as another type of run.
    """
    target = archive_path(run, task)
    table = submission_table(run, task)
    text = table.to_csv(index=False, float_format=decimal_text)  # exact: a rounded threshold could equal a probability
    with atomic_write(target) as temporary:
        if target.suffix == ".csv":
            temporary.write_text(text, encoding="utf-8")
        else:
            _write_zip(run, task, temporary, text, f"{target.stem}.csv" if task == "A" else SCORES, table)
        result = validate_submission(temporary, task, run.test_folder(task))
        result.path = target
        if not result.valid:
            raise SubmissionError(f"{target.name} was not written:\n{result.report()}")
        _claim(run, target, temporary)
    if task == "B":
        with atomic_write(scores_path(run)) as temporary:
            temporary.write_text(text, encoding="utf-8")
            _claim(run, scores_path(run), temporary)
    run.record(**{f"task{task}_submission": str(target)})
    return result


def _claim(run: Run, path: Path, new: Path) -> None:
    """Record in ``run.json`` that the file ``path`` now belongs to this run; another run's file of this name is renamed."""
    lock = home() / "outputs" / ".submission.lock"
    with exclusive(lock, f"another process writes to {run.submission}: waiting for it"):
        records = {record.parent.name: read_json(record) for record in (home() / "outputs").glob("*/run.json")}
        owners = [name for name, facts in records.items() if str(path) in _archives(facts)]
        same = path.is_file() and not owners and filecmp.cmp(path, new, shallow=False)
        if path.is_file() and owners != [run.name] and not same:
            kept = _kept(path, owners[0] if len(owners) == 1 else None)
            path.replace(kept)
            for name in set(owners) - {run.name}:
                _rename_archive(name, records[name], path, kept)
            said = f"was made by run {', '.join(owners)}" if owners else "was made by no run in outputs/"
            print(f"{path.name} {said}: it is kept as {kept.name}, and is now of run {run.name}")
        run.record(archives=sorted({*_archives(records.get(run.name, {})), str(path)}))


def _archives(facts: dict[str, Any]) -> set[str]:
    """The files in ``submission/`` that belong to a run, from its ``run.json``."""
    latest = [facts[key] for key in ("taskA_submission", "taskB_submission") if key in facts]
    return {*latest, *facts.get("archives", [])}


def _kept(path: Path, owner: str | None) -> Path:
    """Where the earlier file of a name goes: that of a known run to a fixed name, any other to a new one."""
    if owner:
        return path.with_name(f"{path.stem}_of_run_{owner}{path.suffix}")
    names = (f"{path.stem}_earlier{number or ''}{path.suffix}" for number in itertools.count())
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())


def _rename_archive(name: str, facts: dict[str, Any], path: Path, kept: Path) -> None:
    renamed = {key: str(kept) for key in ("taskA_submission", "taskB_submission") if facts.get(key) == str(path)}
    archives = sorted({*_archives(facts), str(kept)} - {str(path)})
    update_json(home() / "outputs" / name / "run.json", archives=archives, **renamed)


def submission_table(run: Run, task: str) -> pd.DataFrame:
    """The rows to submit: probabilities, labels at the stored threshold, and the threshold in every row.

    Raises ``FileNotFoundError`` where there are no predictions, ``SubmissionError`` where an image has none or thresholds are
    newer than they are.
    """
    path = run.test_probs(task)
    if not path.is_file():
        raise FileNotFoundError(f"no test probabilities {path}; run 04_infer of this run first")
    table = pd.read_csv(path, dtype={"image_id": str}, keep_default_na=False)[["image_id", "prob"]]
    require_same_kind(run, task)
    inferred = read_json(run.folder / "run.json").get(f"task{task}_inferred")
    thresholds, chosen_with = stored_thresholds(run, task), read_json(run.thresholds)[task].get("inference")
    inferred_with = Thresholds.of(inferred["thresholds"]) if inferred else thresholds
    if inferred_with.facts() != thresholds.facts() or (inferred or {}).get("inference", chosen_with) != chosen_with:
        raise SubmissionError(
            f"the Task {task} thresholds of run {run.name} were chosen anew since its test images were predicted: run 04_infer "
            "of this run again (shards that still hold are taken up)"
        )
    probs = pd.to_numeric(table["prob"], errors="coerce")
    if len(missing := table.loc[~np.isfinite(probs), "image_id"]):
        named = ", ".join(missing[:SHOWN_FAULTS])
        raise SubmissionError(
            f"{path} holds no probability of {len(missing)} image(s): {named}; run 04_infer of this run again"
        )
    table["prob"] = round_probs(probs)
    table["label"] = (table["prob"] >= thresholds.threshold).astype(int)
    for name in HEADERS[task][3:]:
        table[name] = getattr(thresholds, name)
    return table


def _write_zip(run: Run, task: str, path: Path, text: str, csv_name: str, table: pd.DataFrame) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(csv_name, _EPOCH), text, zipfile.ZIP_DEFLATED)
        if task == "B":
            names = mask_names(table["image_id"]).values()
            for name, label in progress(list(zip(names, table["label"], strict=True)), "archive"):
                mask = run.masks / name
                if not mask.is_file():
                    raise FileNotFoundError(f"no mask {mask}; run 04_infer of this run again")
                content = mask.read_bytes() if label else _empty_like(mask)
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_STORED)


def _empty_like(mask: Path) -> bytes:
    """The content of an all-zero mask file of the size of another."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{MASK_KEY: np.zeros_like(load_mask(mask))})  # type: ignore[arg-type]  # numpy's stub
    return buffer.getvalue()
