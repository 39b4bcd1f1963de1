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
ON_PAGE = 200  # most pictures of a page; the table holds all
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
        """The answer in words; "unsure" where a change turns the decision."""
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


def first_look(paths: Iterable[str | Path], predictor: Predictor) -> Iterator[tuple[Verdict, Answer]]:
    """A verdict on each picture of files and folders as it is, with its answer, whose mask the verdict does not keep.

    Raises as ``predict`` does.
    """
    items = collected(paths)
    for item, answer in zip(items, predictor.answers(items, title="pictures as they are"), strict=True):
        note = _note(item.name, predictor.params.crop_size) if answer.error is None else ""
        yield Verdict(item, replace(answer, mask=None), note=note), answer


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


def draw(verdict: Verdict, answer: Answer, predictor: Predictor) -> None:
    """Keep what the model looked at with a verdict: Task A's crops, or Task B's probabilities and flagged pixels."""
    image = read_image(verdict.item.name)
    if answer.mask is None:
        shown = Image.fromarray(crop_outlines(image, predictor.params))
        shown.thumbnail((SIDE, SIDE))
    else:
        shown = _panels(image, answer.mask, predictor.thresholds.loc_threshold)
    verdict.picture = base64.b64encode(webp(shown)).decode()


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
    for verdict, answer in first_look(paths, predictor):
        verdicts.append(verdict)
        if answer.mask is not None:
            verdict.mask = _write_mask(out, len(verdicts), verdict, answer.mask >= predictor.thresholds.loc_threshold)
        if report and answer.error is None and len(verdicts) <= ON_PAGE:
            draw(verdict, answer, predictor)
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
    read = [verdict.answer.label is not None for verdict in verdicts]
    columns = {name: [getattr(verdict.answer, name) for verdict in verdicts] for name in ("path", "prob", "label", "error")}
    table = pd.DataFrame(columns).astype({"label": "Int64"})
    table.insert(
        3, "unsure", pd.array([bool(v.flips) if known else None for v, known in zip(verdicts, read, strict=True)], "boolean")
    )
    if any(verdict.mask for verdict in verdicts):
        table["mask"] = [verdict.mask for verdict in verdicts]
    for name in CHANGES:
        table[f"prob, {name}"] = [
            verdict.changed[name].prob if known else None for verdict, known in zip(verdicts, read, strict=True)
        ]
    return table


def _print(verdicts: list[Verdict], predictor: Predictor, target: Path) -> None:
    for verdict in verdicts[:SAID]:
        print(f"{verdict.name}: {verdict.sentence(predictor)} {verdict.note}".rstrip())
    if len(verdicts) > SAID:
        print(f"... and {len(verdicts) - SAID} more in the table")
    unread, unsure = (sum(map(bool, flags)) for flags in zip(*((v.answer.error, v.flips) for v in verdicts), strict=True))
    print(f"{len(verdicts)} pictures, {unsure} unsure, {unread} not read: {target}")
