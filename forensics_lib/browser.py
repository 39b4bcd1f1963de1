"""A browser of masks for JupyterLab: one image at a time, with sliders for threshold and opacity.

Where widgets cannot run (papermill, a printed notebook) the galleries of ``plots`` stand in.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from PIL import Image

from forensics_lib.evaluation import Evaluation, MaskExample, stored_thresholds
from forensics_lib.images import read_image
from forensics_lib.inference import load_mask, predict_mask
from forensics_lib.machine import choose_machine
from forensics_lib.model import load_model
from forensics_lib.plots import decided
from forensics_lib.runs import Run
from forensics_lib.scoring import truth_mask

VIEWS = ("side by side", "overlay", "image", "probability")
ZOOMS = {"1:1": 1, "2:1": 2, "4:1": 4}


class MaskBrowser:
    """Choose an image; see it, its mask's probability and what the threshold decides, at native pixels.

    ``names`` are shown in the list, ``load`` gives the example of a position and is called when it is chosen.
    """

    def __init__(self, names: list[str], load: Callable[[int], MaskExample], loc_threshold: float) -> None:
        if not names:
            raise ValueError("no image to browse")
        self._load, self._count = load, len(names)
        self.chosen = widgets.Dropdown(options=list(zip(names, range(len(names)), strict=True)), description="image")
        self.back, self.forth = widgets.Button(description="previous"), widgets.Button(description="next")
        self.threshold = widgets.FloatSlider(loc_threshold, min=0.0, max=1.0, step=0.01, description="threshold")
        self.opacity = widgets.FloatSlider(0.65, min=0.0, max=1.0, step=0.05, description="opacity")
        self.view = widgets.ToggleButtons(options=VIEWS, description="view")
        self.zoom = widgets.ToggleButtons(options=ZOOMS, description="zoom")
        self.text, self.picture = widgets.HTML(), widgets.Image(format="png")
        self.back.on_click(lambda _: self._step(-1))
        self.forth.on_click(lambda _: self._step(1))
        self.chosen.observe(self._choose, "value")
        for control in (self.threshold, self.opacity, self.view, self.zoom):
            control.observe(self._draw, "value")
        self._choose()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        first = widgets.HBox([self.chosen, self.back, self.forth])
        second = widgets.HBox([self.threshold, self.opacity])
        scrolled = widgets.Box([self.picture], layout=widgets.Layout(overflow="auto", max_height="640px"))
        display(widgets.VBox([first, second, self.view, self.zoom, self.text, scrolled]))

    def _step(self, by: int) -> None:
        self.chosen.value = (self.chosen.value + by) % self._count

    def _choose(self, _: Any = None) -> None:
        self._example = self._load(self.chosen.value)
        self._draw()

    def _draw(self, _: Any = None) -> None:
        example, threshold = self._example, self.threshold.value
        overlay = decided(example, threshold, self.opacity.value)
        probability = np.repeat(example.mask.astype(float)[..., None], 3, 2)
        panels = {"overlay": [overlay], "image": [example.image / 255], "probability": [probability]}
        shown = panels.get(self.view.value, [example.image / 255, probability, overlay])
        pixels = (np.concatenate(shown, 1) * 255).round().clip(0, 255).astype(np.uint8)
        zoom = self.zoom.value
        buffer = io.BytesIO()
        Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1)).save(buffer, "PNG", compress_level=1)
        self.picture.value = buffer.getvalue()
        self.picture.layout = widgets.Layout(width=f"{pixels.shape[1] * zoom}px", flex="0 0 auto")
        self.text.value = self._sentence(example, threshold)

    def _sentence(self, example: MaskExample, threshold: float) -> str:
        flagged = example.mask >= threshold
        text = f"{example.image.shape[1]} x {example.image.shape[0]} pixels, {flagged.mean():.1%} flagged"
        if example.truth is None:
            return text
        union = (flagged | example.truth).sum()
        return (
            f"{text}, {example.truth.mean():.1%} manipulated, IoU {(flagged & example.truth).sum() / union if union else 1:.3f}"
        )


def browse_test_masks(run: Run, results: pd.DataFrame) -> MaskBrowser:
    """The masks that were written for the readable test images, from the highest probability to the lowest."""
    rows = results[results["error"].isna()].sort_values("prob", ascending=False, kind="stable")
    names = [f"{row['prob']:.2f}  {row['image_id']}" for _, row in rows.iterrows()]

    def load(index: int) -> MaskExample:
        path = Path(rows["path"].iloc[index])
        return MaskExample(names[index], read_image(path), load_mask(run.masks / f"{path.stem}.npz"), None)

    return MaskBrowser(names, load, stored_thresholds(run, "B")["loc_threshold"])


def browse_evaluated_masks(run: Run, evaluation: Evaluation) -> MaskBrowser:
    """The images of an evaluation with their truth, manipulated ones first, from the worst mask to the best."""
    order = ["label", "iou", "flagged"]
    rows = evaluation.table.sort_values(order, ascending=[False, True, False], kind="stable")
    names = [f"IoU {row['iou']:.2f}  {row['kind']}  {row['method']}  {row['image_id']}" for _, row in rows.iterrows()]
    machine = choose_machine(run.params)
    model = load_model(run.finetuned_model("B"), "B")[0].to(machine.device)

    def load(index: int) -> MaskExample:
        row = rows.iloc[index]
        image = read_image(Path(row["path"]))
        _, mask = predict_mask(model, image, run.params, machine)
        return MaskExample(names[index], image, mask, truth_mask(row, image.shape[:2]))

    return MaskBrowser(names, load, evaluation.thresholds["loc_threshold"])
