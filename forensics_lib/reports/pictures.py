"""Pictures of one's own: a model's answers, and whether they hold after common changes; as a table, masks and a page."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from forensics_lib.evaluation.robustness import Change
from forensics_lib.images.io import ImageError, open_image, read_image
from forensics_lib.inference.predictor import Answer, Item, Predictor, collected
from forensics_lib.reports.figures import CLASS_NAMES, MaskExample, crop_outlines, decision_overlay
from forensics_lib.reports.report import template, webp
from forensics_lib.utils.files import atomic_write, home, plain_stem, write_csv, write_text

CHANGES = {  # by what is said of them: of the robustness sweep, those that nearly every picture goes through
    "saved as JPEG of quality 85": Change("JPEG quality", 85),
    "saved as JPEG of quality 65": Change("JPEG quality", 65),
    "shrunk to 75%": Change("shrunk", 0.75),
    "shrunk to 50%": Change("shrunk", 0.5),
}
SIDE = 900  # longer side of a shown picture, pixels
ON_PAGE = 200  # most pictures that are shown; the table holds all
SAID = 20  # most answers that a command prints
ORIENTATION = 0x0112  # EXIF tag
TRAIN = (
    "`make run-constrained` trains both tasks, without data on a built-in sample in a few minutes. Or give the path of a "
    "checkpoint from elsewhere."
)


@dataclass
class Verdict:
    """The answers for one picture as it is and after each of ``CHANGES``, without masks."""

    item: Item
    answer: Answer
    changed: dict[str, Answer] = field(default_factory=dict)  # none of a picture that cannot be read
    note: str = ""  # how its file was read, where that may surprise
    picture: str = ""  # what the model looked at, WebP in base64
    mask: str | None = None  # name of the written mask

    @property
    def flips(self) -> dict[str, Answer]:
        """The changes after which the decision is another one."""
        tried = {name: answer for name, answer in self.changed.items() if answer.label is not None}
        return {name: answer for name, answer in tried.items() if answer.label != self.answer.label}

    @property
    def name(self) -> str:
        return Path(self.answer.path).name

    def sentence(self, predictor: Predictor) -> str:
        """The answer in words; "unsure" where a change of the picture changes the decision."""
        answer, names = self.answer, CLASS_NAMES[predictor.task]
        if answer.label is None:
            return f"Not read. {answer.error}"
        found = f"(probability {answer.prob:.3f}, threshold {predictor.thresholds.threshold:.3f})"
        if self.flips:
            turned = ", ".join(f"{name} ({other.prob:.3f})" for name, other in self.flips.items())
            return f"Unsure: {names[answer.label]} as it is {found}, but {names[1 - answer.label]} when {turned}."
        failed = [other.error for other in self.changed.values() if other.error]
        held = ["The decision holds after every change that was tried."] if len(failed) < len(self.changed) else []
        return " ".join([f"{names[answer.label].capitalize()} {found}.", *held, *(f"Not tried: {why}." for why in failed)])


def first_look(
    paths: Iterable[str | Path], predictor: Predictor, *, drawn: bool
) -> Iterator[tuple[Verdict, np.ndarray | None]]:
    """A verdict on each picture of files and folders as it is, and its mask, which the verdict does not keep.

    ``drawn``: the first ``ON_PAGE`` hold a picture of what the model looked at.  Raises as ``predict`` does.
    """
    items = collected(paths)
    answers = predictor.answers(items, title="pictures as they are")
    side = predictor.params.crop_size if "crop_size" in predictor.params.model_fields_set else 0  # 0.1 stored none for Task B
    for number, (item, answer) in enumerate(zip(items, answers, strict=True)):
        verdict = Verdict(item, replace(answer, mask=None))
        if answer.error is None:
            verdict.note = _note(item.name, side)
            verdict.picture = _drawn(item.name, answer.mask, predictor) if drawn and number < ON_PAGE else ""
        yield verdict, answer.mask


def try_changes(verdicts: list[Verdict], predictor: Predictor) -> None:
    """Add to each verdict the answers after ``CHANGES``."""
    read = [verdict for verdict in verdicts if verdict.answer.error is None]
    items = [verdict.item for verdict in read]
    for name, change in CHANGES.items() if read else ():
        for verdict, answer in zip(read, predictor.answers(items, change, f"pictures {name}"), strict=True):
            verdict.changed[name] = replace(answer, mask=None)


def _note(path: str, crop_size: int) -> str:
    """What the reader did with a file that its owner may not expect, and whether the picture is too small.

    Empty where its metadata are damaged: the pixels were read.
    """
    notes: dict[str, bool] = {}
    with suppress(ImageError), open_image(path) as image:
        frames, turned = getattr(image, "n_frames", 1), image.getexif().get(ORIENTATION, 1) != 1
        notes = {
            "EXIF says that a viewer turns this picture; the model, the picture here and its mask do not.": turned,
            "Its transparency is dropped: the colours below it count.": image.has_transparency_data,
            f"The first of its {frames} frames counts.": frames > 1,
            f"At {image.width} x {image.height} pixels it is smaller than the {crop_size} pixels that the model learned from: "
            "the answer says little.": min(image.size) < crop_size,
        }
    return " ".join(note for note, applies in notes.items() if applies)


def _drawn(path: str, mask: np.ndarray | None, predictor: Predictor) -> str:
    """Task A's crops, or Task B's probabilities and flagged pixels, as WebP in base64."""
    image = read_image(path)
    if mask is None:
        shown = Image.fromarray(crop_outlines(image, predictor.params))
        shown.thumbnail((SIDE, SIDE))
    else:
        shown = _panels(image, mask, predictor.thresholds.loc_threshold)
    return base64.b64encode(webp(shown)).decode()


def _panels(image: np.ndarray, mask: np.ndarray, loc_threshold: float) -> Image.Image:
    """An image, the probabilities of its mask and the flagged pixels, made small, side by side."""
    small = Image.fromarray(image)
    small.thumbnail((SIDE // 2, SIDE // 2))
    level = np.asarray(Image.fromarray(mask.astype(np.float32)).resize(small.size, Image.Resampling.BOX))
    example = MaskExample("", np.asarray(small), level, None)
    panels = [example.image / 255, np.repeat(level[..., None], 3, 2), decision_overlay(example, loc_threshold)]
    return Image.fromarray((np.concatenate(panels, 1) * 255).round().clip(0, 255).astype(np.uint8))


def as_html(verdicts: list[Verdict], predictor: Predictor, page: bool = False) -> str:
    """The verdicts as HTML: a part of a page, or a page of its own that works offline."""
    facts = {"verdicts": verdicts[:ON_PAGE], "more": len(verdicts[ON_PAGE:]), "predictor": predictor}
    return template("predictions.html.j2" if page else "verdicts.html.j2").render(**facts, names=CLASS_NAMES[predictor.task])


def predict_pictures(paths: list[str], checkpoint: str | None, out: Path, *, report: bool = False) -> list[Verdict]:
    """Write what a model says of pictures to a folder, and print it in words.

    ``predictions.csv`` has a row per picture: path, prob, label, unsure (whether one of ``CHANGES`` turns the label), error,
    mask (Task B), and prob after each change.  Masks are PNG files in ``masks``, white where a pixel's probability reaches
    the localization threshold, whatever the label.  ``report`` adds ``predictions.html``, which needs no other file.

    Args:
        paths: files and folders; what cannot be read keeps its row, with the reason.
        checkpoint: the ``..._finetuned_model.pth`` of an evaluated run.
        out: the folder, made where it is not there; results of the same names are replaced.
        report: whether to write the page.

    Raises:
        FileNotFoundError: no such checkpoint; the message lists those in ``outputs``, or says how to get one.
        LayoutError, CheckpointError, BrokenModelError, ValueError: as of ``predict``.
    """
    predictor = Predictor(_existing(checkpoint))
    verdicts: list[Verdict] = []
    for verdict, mask in first_look(paths, predictor, drawn=report):
        verdicts.append(verdict)
        if mask is not None:
            verdict.mask = _write_mask(out, len(verdicts), verdict, mask >= predictor.thresholds.loc_threshold)
    try_changes(verdicts, predictor)
    write_csv(out / "predictions.csv", as_table(verdicts))
    if report:
        write_text(out / "predictions.html", as_html(verdicts, predictor, page=True))
    _print(verdicts, predictor, out / f"predictions.{'html' if report else 'csv'}")
    return verdicts


def _existing(checkpoint: str | None) -> Path:
    """The path of a checkpoint.  Raises ``FileNotFoundError`` with those in ``outputs`` where it is none."""
    if checkpoint and Path(checkpoint).expanduser().is_file():
        return Path(checkpoint)
    found = sorted(map(str, (home() / "outputs").glob("*_finetuned_model.pth")))
    there = f"No run in {home() / 'outputs'} is trained: {TRAIN}"
    if found:
        there = "\n  ".join(["There are", *found])
    raise FileNotFoundError(f"{f'no checkpoint {checkpoint}' if checkpoint else '--checkpoint names none'}. {there}")


def _write_mask(out: Path, number: int, verdict: Verdict, flagged: np.ndarray) -> str:
    """Write a mask ``(H, W)`` bool as PNG; returns its name within ``out``."""
    name = f"masks/{number:04}_{plain_stem(verdict.item.name)}.png"
    with atomic_write(out / name) as temporary:
        Image.fromarray(flagged.astype(np.uint8) * 255).save(temporary, "PNG")
    return name


def as_table(verdicts: list[Verdict]) -> pd.DataFrame:
    """A row per picture, as in ``predictions.csv``."""
    answers = [verdict.answer for verdict in verdicts]
    columns: dict[str, list] = {name: [getattr(answer, name) for answer in answers] for name in ("path", "prob", "label")}
    columns["unsure"] = [bool(verdict.flips) if verdict.changed else None for verdict in verdicts]
    columns["error"] = [answer.error for answer in answers]
    if any(verdict.mask for verdict in verdicts):
        columns["mask"] = [verdict.mask for verdict in verdicts]
    for name in CHANGES:
        columns[f"prob, {name}"] = [verdict.changed[name].prob if verdict.changed else np.nan for verdict in verdicts]
    return pd.DataFrame(columns).astype({"label": "Int64", "unsure": "boolean"})


def _print(verdicts: list[Verdict], predictor: Predictor, target: Path) -> None:
    for verdict in verdicts[:SAID]:
        print(f"{verdict.name}: {verdict.sentence(predictor)} {verdict.note}".rstrip())
    if len(verdicts) > SAID:
        print(f"... and {len(verdicts) - SAID} more in the table")
    unread, unsure = (sum(map(bool, flags)) for flags in zip(*((v.answer.error, v.flips) for v in verdicts), strict=True))
    print(f"{len(verdicts)} pictures, {unsure} unsure, {unread} not read: {target}")
