"""Browsers for JupyterLab: one image at a time, chosen from a list that can be filtered and sorted.

``MaskBrowser`` shows masks with sliders for threshold and opacity, ``ImageBrowser`` the crops that Task A scored.  Images are
read and predicted when they are chosen, thumbnails when their page is shown.  ``OwnPictures`` takes any other pictures.
Where nobody can use widgets (``FORENSICS_HEADLESS``, a printed notebook) none are made, and the galleries of ``plots`` stand
in.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import lru_cache
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import Markdown
from PIL import Image

from forensics_lib.device import choose_machine
from forensics_lib.evaluation.evaluate import Evaluation
from forensics_lib.evaluation.predictions import truth_mask
from forensics_lib.images.io import ImageError, read_image
from forensics_lib.images.masks import load_mask
from forensics_lib.inference.detectors import answer, load_detector
from forensics_lib.inference.predictor import Predictor
from forensics_lib.models.combined import CombinedModel
from forensics_lib.reports.attribution import grad_cam
from forensics_lib.reports.figures import MaskExample, crop_outlines, decision_overlay
from forensics_lib.reports.pictures import as_html, first_look, try_changes
from forensics_lib.run import Run, stored_thresholds
from forensics_lib.utils.files import atomic_write, plain_stem
from forensics_lib.utils.progress import headless

MASK_VIEWS = ("side by side", "overlay", "image", "probability")
IMAGE_VIEWS = ("side by side", "image", "crops", "attribution")
ZOOMS = {"1:1": 1, "2:1": 2, "4:1": 4}
EVERY = "all"
GALLERIES = "*Executed headlessly: the galleries above stand in. With a running kernel images can be seen one by one.*"
NO_PICTURES = "*Executed headlessly. With a running kernel, pictures of your own can be looked at here.*"
THUMBNAILS, SIDE = 8, 96  # on a page, and their longer side in pixels


class Browser:
    """A list of images with filters, an order and thumbnails, and the picture of the chosen one at native pixels.

    ``table`` has one row per image with its ``path`` and a ``name`` for the list; the columns in ``filters`` can be filtered
    by; ``orders`` gives for each name of an order the column to sort by and whether upwards.  In the box with the image's
    number the arrow keys go from image to image (JupyterLab keeps them for itself elsewhere).  ``folder`` is where pictures
    are saved.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        filters: list[str],
        orders: dict[str, tuple[str, bool]],
        views: tuple[str, ...],
        folder: Path,
    ) -> None:
        if table.empty:
            raise ValueError("no image to browse")
        self._table, self._orders, self._folder = table.reset_index(drop=True), orders, folder
        self._table[filters] = self._table[filters].fillna("-").astype(str)
        self.filters = {
            name: widgets.Dropdown(options=[EVERY, *sorted(self._table[name].unique())], description=name) for name in filters
        }
        self.order = widgets.Dropdown(options=list(orders), description="order")
        self.chosen = widgets.Select(rows=10, layout=widgets.Layout(width="auto", min_width="380px"))
        self.number = widgets.BoundedIntText(1, min=1, description="number", layout=widgets.Layout(width="170px"))
        self.back, self.forth = widgets.Button(description="previous"), widgets.Button(description="next")
        self.export, self.said = widgets.Button(description="save picture"), widgets.Label()
        self.view = widgets.ToggleButtons(options=views, description="view")
        self.zoom = widgets.ToggleButtons(options=ZOOMS, description="zoom")
        self.text, self.picture = widgets.Label(), widgets.Image(format="png")
        self.page = widgets.HBox()
        self._thumbnail = lru_cache(maxsize=2000)(_thumbnail)
        self.back.on_click(lambda _: self._step(-1))
        self.forth.on_click(lambda _: self._step(1))
        self.export.on_click(self._export)
        for control in (*self.filters.values(), self.order):
            control.observe(self._list, "value")
        self.chosen.observe(self._choose, "value")
        self.number.observe(self._count, "value")
        for control in (self.view, self.zoom):
            control.observe(self._draw, "value")
        self._page_shown: tuple[int, ...] = ()
        self._filling = False  # while the list changes, its number and its choice do not answer to each other
        self._loaded: int | None = None  # the image that is shown
        self._list()

    def controls(self) -> list[widgets.Widget]:
        """Further controls of a kind of browser."""
        return []

    def load(self, index: int) -> None:
        """Make the image at a position of the table the current one."""
        raise NotImplementedError

    def panels(self) -> list[np.ndarray]:
        """The current image in the chosen view, panels side by side; ``(H, W, 3)`` in [0, 1] each."""
        raise NotImplementedError

    def sentence(self) -> str:
        """The caption of the current image."""
        raise NotImplementedError

    def _ipython_display_(self) -> None:
        from IPython.display import display

        first = widgets.VBox([*self.filters.values(), self.order])
        buttons = widgets.HBox([self.number, self.back, self.forth, self.export, self.said])
        scrolled = widgets.Box([self.picture], layout=widgets.Layout(overflow="auto", max_height="640px"))
        rows = [widgets.HBox([self.chosen, first]), self.page, buttons, *self.controls(), self.view, self.zoom, self.text]
        display(widgets.VBox([*rows, scrolled]))

    def _list(self, _: Any = None) -> None:
        """Fill the list by filters and order."""
        rows = self._table
        for name, control in self.filters.items():
            if control.value != EVERY:
                rows = rows[rows[name] == control.value]
        column, upwards = self._orders[self.order.value]
        rows = rows.sort_values(column, ascending=upwards, kind="stable")
        self._shown = rows.index.tolist()
        self.said.value = "" if self._shown else "no image fits these filters"
        self._filling = True
        try:
            self.chosen.options = list(zip(rows["name"], self._shown, strict=True))
            self.chosen.value = self._shown[0] if self._shown else None
            self.number.max = max(1, len(self._shown))
            self.number.value = 1
        finally:
            self._filling = False
        self._choose()

    def _step(self, by: int) -> None:
        if self.chosen.value is not None:
            self.chosen.value = self._shown[(self._shown.index(self.chosen.value) + by) % len(self._shown)]

    def _count(self, _: Any = None) -> None:
        if self.chosen.value is not None and not self._filling:
            self.chosen.value = self._shown[self.number.value - 1]

    def _choose(self, _: Any = None) -> None:
        if self._filling:
            return
        self._loaded = None
        if self.chosen.value is None:
            self._page_shown, self.page.children = (), ()
            self._show_nothing("")
            return
        self.number.value = self._shown.index(self.chosen.value) + 1
        self._show_page()
        try:
            self.load(self.chosen.value)
        except (ImageError, OSError) as error:  # also a mask that was removed
            self._show_nothing(str(error))
            return
        self._loaded = self.chosen.value
        self._draw()

    def _show_nothing(self, why: str) -> None:
        self.picture.value, self.text.value = b"", why

    def _show_page(self) -> None:
        """The thumbnails around the chosen image, each above a button that chooses it."""
        place = self._shown.index(self.chosen.value) // THUMBNAILS * THUMBNAILS
        members = tuple(self._shown[place : place + THUMBNAILS])
        if members == self._page_shown:
            return
        self._page_shown = members
        boxes = []
        for offset, index in enumerate(members):
            button = widgets.Button(description=str(place + offset + 1), layout=widgets.Layout(width=f"{SIDE}px"))
            button.on_click(lambda _, index=index: self._pick(index))
            boxes.append(widgets.VBox([widgets.Image(value=self._thumbnail(self._table["path"][index])), button]))
        self.page.children = boxes

    def _pick(self, index: int) -> None:
        if index in self._shown:  # a click may come from a page that has just gone
            self.chosen.value = index

    def _draw(self, _: Any = None) -> None:
        if self._loaded is None:
            return
        panels = self.panels()
        height = max(panel.shape[0] for panel in panels)
        level = [np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0)), constant_values=1.0) for p in panels]
        pixels = (np.concatenate(level, 1) * 255).round().clip(0, 255).astype(np.uint8)
        zoom = self.zoom.value
        buffer = io.BytesIO()
        Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1)).save(buffer, "PNG", compress_level=1)
        self.picture.value = buffer.getvalue()
        self.picture.layout = widgets.Layout(width=f"{pixels.shape[1] * zoom}px", flex="0 0 auto")
        self.text.value = self.sentence()

    def _export(self, _: Any = None) -> None:
        if self._loaded is None:
            return
        target = self._folder / f"browsed_{plain_stem(self._table['path'][self._loaded])}.png"
        with atomic_write(target) as temporary:
            temporary.write_bytes(self.picture.value)
        self.said.value = f"saved {target}"


def _thumbnail(path: str) -> bytes:
    """A small PNG of an image; a grey square where it cannot be read."""
    try:
        image = Image.fromarray(read_image(path))
    except ImageError:
        image = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class MaskBrowser(Browser):
    """Masks: probability, and hits and errors at a threshold that can be moved; ``example`` gives them by position."""

    def __init__(
        self,
        table: pd.DataFrame,
        filters: list[str],
        orders: dict[str, tuple[str, bool]],
        folder: Path,
        example: Callable[[int], MaskExample],
        loc_threshold: float,
    ) -> None:
        self._get = example
        self.threshold = widgets.FloatSlider(loc_threshold, min=0.0, max=1.0, step=0.01, description="threshold")
        self.opacity = widgets.FloatSlider(0.65, min=0.0, max=1.0, step=0.05, description="opacity")
        super().__init__(table, filters, orders, MASK_VIEWS, folder)
        for control in (self.threshold, self.opacity):
            control.observe(self._draw, "value")

    def controls(self) -> list[widgets.Widget]:
        return [widgets.HBox([self.threshold, self.opacity])]

    def load(self, index: int) -> None:
        self._example = self._get(index)

    def panels(self) -> list[np.ndarray]:
        overlay = decision_overlay(self._example, self.threshold.value, self.opacity.value)
        probability = np.repeat(self._example.mask.astype(float)[..., None], 3, 2)
        image = self._example.image / 255
        single = {"overlay": [overlay], "image": [image], "probability": [probability]}
        return single.get(self.view.value, [image, probability, overlay])

    def sentence(self) -> str:
        example, flagged = self._example, self._example.mask >= self.threshold.value
        text = f"{example.image.shape[1]} x {example.image.shape[0]} pixels, {flagged.mean():.1%} flagged"
        if example.truth is None:
            return text
        union, both = (flagged | example.truth).sum(), (flagged & example.truth).sum()
        return f"{text}, {example.truth.mean():.1%} manipulated, IoU {both / union if union else 1:.3f}"


class ImageBrowser(Browser):
    """Task A: an image with its probability, the crops that were scored, and where the model sees signs of generation."""

    def __init__(self, run: Run, table: pd.DataFrame, filters: list[str], orders: dict[str, tuple[str, bool]]) -> None:
        self._run, self._machine = run, choose_machine(run.params)
        self._model = load_detector(run, "A")
        views = IMAGE_VIEWS if isinstance(self._model, CombinedModel) else ("image",)  # which has no crops to show
        super().__init__(table, filters, orders, views, run.folder / "figures")

    def load(self, index: int) -> None:
        self._row = self._table.loc[index]
        self._image = read_image(self._row["path"])
        self._heat: np.ndarray | None = None

    def panels(self) -> list[np.ndarray]:
        image, view = self._image / 255, self.view.value
        if view == "image":
            return [image]
        shown = {"crops": self._crops, "attribution": self._attribution}
        return [shown[view]()] if view in shown else [image, self._crops(), self._attribution()]

    def _crops(self) -> np.ndarray:
        return crop_outlines(self._image, self._run.params) / 255

    def _attribution(self) -> np.ndarray:
        if not isinstance(self._model, CombinedModel):
            return self._image / 255
        if self._heat is None:
            shown, heat = grad_cam(self._model, self._image, self._machine)
            grey = np.repeat(shown.mean(2, keepdims=True) / 255, 3, 2)
            warm = np.stack([heat, heat * 0.45, np.zeros_like(heat)], 2)
            self._heat = grey * (1 - 0.6 * heat[..., None]) + 0.6 * warm
        return self._heat

    def sentence(self) -> str:
        height, width = self._image.shape[:2]
        known = "" if pd.isna(self._row.get("label")) else f", is {'synthetic' if self._row['label'] else 'authentic'}"
        return f"{width} x {height} pixels, probability {self._row['prob']:.3f}{known}"


class OwnPictures:
    """Takes pictures of one's own, uploaded or by path, and shows what a model says of them as they are and changed.

    ``checkpoints`` are those to choose from, by task.
    """

    def __init__(self, checkpoints: dict[str, Path]) -> None:
        self.task = widgets.ToggleButtons(options=[(f"Task {task}", path) for task, path in checkpoints.items()])
        self.upload = widgets.FileUpload(multiple=True, description="choose pictures", layout=widgets.Layout(width="auto"))
        where = f"or a path of a picture or folder; relative ones begin in {Path.cwd()}"
        self.path = widgets.Text(placeholder=where, continuous_update=False, layout=widgets.Layout(width="560px"))
        self.said, self.answers = widgets.Output(), widgets.HTML()
        self._predictor = lru_cache(maxsize=None)(Predictor)
        self.upload.observe(self._look_at_uploads, "value")
        self.path.observe(self._look_at_path, "value")

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(widgets.VBox([self.task, widgets.HBox([self.upload, self.path]), self.said, self.answers]))

    def _look_at_path(self, _: Any = None) -> None:
        if self.path.value.strip():
            self._look([self.path.value.strip()])

    def _look_at_uploads(self, _: Any = None) -> None:
        with TemporaryDirectory() as folder:
            paths = [Path(folder) / Path(file["name"]).name for file in self.upload.value]
            for path, file in zip(paths, self.upload.value, strict=True):
                path.write_bytes(file["content"])
            if paths:
                self._look(paths)
            self.answers.value = self.answers.value.replace(f"{folder}{os.sep}", "")

    def _look(self, paths: list[str] | list[Path]) -> None:
        """Show the verdicts on pictures, or why there are none; progress is shown meanwhile."""
        self.answers.value = ""
        self.said.clear_output()
        with self.said:
            try:
                predictor = self._predictor(self.task.value)
                verdicts = [verdict for verdict, _ in first_look(paths, predictor, drawn=True)]
                try_changes(verdicts, predictor)
                self.answers.value = as_html(verdicts, predictor)
            except (ValueError, OSError, RuntimeError) as error:  # as the library tells what is wrong
                self.answers.value = f"<p>{escape(str(error))}</p>"


def browse_own_pictures(run: Run) -> OwnPictures | Markdown:
    """What the models of a run say of any picture; a note in a headless run."""
    if headless():
        return Markdown(NO_PICTURES)
    return OwnPictures({task: run.finetuned_model(task) for task in run.params.tasks})


def browse_test_masks(run: Run, results: pd.DataFrame) -> MaskBrowser | Markdown:
    """The masks that were written for the readable test images; a note in a headless run."""
    if headless():
        return Markdown(GALLERIES)
    table = results[results["error"].isna()].reset_index(drop=True)
    table = table.assign(name=[f"{prob:.2f}  {name}" for prob, name in zip(table["prob"], table["image_id"], strict=True)])
    table = _with_outcomes(table, stored_thresholds(run, "B").threshold)

    def example(index: int) -> MaskExample:
        path = Path(table["path"][index])
        return MaskExample(table["name"][index], read_image(path), load_mask(run.masks / f"{path.stem}.npz"), None)

    orders = {"highest probability": ("prob", False), "lowest probability": ("prob", True), "borderline": ("doubt", True)}
    return MaskBrowser(table, ["called"], orders, run.folder / "figures", example, stored_thresholds(run, "B").loc_threshold)


def browse_evaluated_masks(run: Run, evaluation: Evaluation) -> MaskBrowser | Markdown:
    """The images of an evaluation with their truth, predicted when an image is chosen; a note in a headless run."""
    if headless():
        return Markdown(GALLERIES)
    table = _with_outcomes(evaluation.table, evaluation.thresholds.threshold)
    table["score"] = table["iou"].where(table["label"] == 1, 1 - table["flagged"])
    said = [
        f"{'IoU' if row['label'] else 'clean'} {row['score']:.2f}  {row['kind']}  {row['method']}  {row['image_id']}"
        for _, row in table.fillna({"kind": "-", "method": "-"}).iterrows()
    ]
    table["name"] = said
    machine = choose_machine(run.params)
    model = load_detector(run, "B")

    def example(index: int) -> MaskExample:
        row = table.loc[index]
        image = read_image(Path(row["path"]))
        return MaskExample(said[index], image, answer(model, image, run.params, machine)[1], truth_mask(row, image.shape[:2]))

    orders = {"worst": ("score", True), "best": ("score", False), "borderline": ("doubt", True), "name": ("image_id", True)}
    filters = ["kind", "method", "source", "size", "verdict"]
    return MaskBrowser(table, filters, orders, run.folder / "figures", example, evaluation.thresholds.loc_threshold)


def browse_evaluated_images(run: Run, evaluation: Evaluation) -> ImageBrowser | Markdown:
    """Task A: the images of an evaluation; a note in a headless run."""
    if headless():
        return Markdown(GALLERIES)
    table = _with_outcomes(evaluation.table, evaluation.thresholds.threshold)
    wrong = (table["prob"] - evaluation.thresholds.threshold) * (1 - 2 * table["label"])
    named = [
        f"{prob:.2f}  {source}  {name}" for prob, source, name in table[["prob", "source", "image_id"]].itertuples(index=False)
    ]
    orders = {
        "most wrong": ("wrong", False),
        "surest": ("wrong", True),
        "borderline": ("doubt", True),
        "name": ("image_id", True),
    }
    return ImageBrowser(
        run, table.assign(wrong=wrong, name=named), ["source", "generator", "platform", "format", "verdict"], orders
    )


def _with_outcomes(table: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """The table with each image's name, its distance to the threshold, and its outcome where the label is known."""
    positive = table["prob"] >= threshold
    facts: dict[str, Any] = {"called": np.where(positive, "positive", "authentic"), "doubt": (table["prob"] - threshold).abs()}
    if "label" in table:
        verdicts = np.array([["right, authentic", "false alarm"], ["missed", "right, positive"]])
        facts["verdict"] = verdicts[table["label"].to_numpy(int), positive.to_numpy(int)]
    return table.reset_index(drop=True).assign(**facts)
