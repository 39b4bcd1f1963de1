import io
import time

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest
from conftest import picture, save
from PIL import Image

from forensics_lib.evaluation.evaluate import evaluate
from forensics_lib.images.io import read_image
from forensics_lib.inference.shards import infer
from forensics_lib.reports.browser import (
    EVERY,
    IMAGE_VIEWS,
    MASK_VIEWS,
    THUMBNAILS,
    Browser,
    MaskBrowser,
    browse_evaluated_images,
    browse_evaluated_masks,
    browse_test_masks,
)
from forensics_lib.reports.figures import MaskExample

ORDERS = {"worst": ("score", True), "best": ("score", False)}


def browser_of(table: pd.DataFrame, folder, filters: list[str] | None = None) -> MaskBrowser:
    def example(index: int) -> MaskExample:
        mask = np.linspace(0, 1, 40 * 60).reshape(40, 60).astype(np.float16)
        return MaskExample("", read_image(table["path"][index]), mask, mask > 0.5 if index else None)

    return MaskBrowser(table, filters or ["kind"], ORDERS, folder, example, 0.5)


@pytest.fixture
def table(tmp_path, rng) -> pd.DataFrame:
    paths = [save(tmp_path / f"{number}.png", picture(rng, 40, 60)) for number in range(20)]
    kinds = ["sp", "fr", None, "sp"] * 5
    names = [f"image {number}" for number in range(20)]
    return pd.DataFrame({"path": [str(p) for p in paths], "name": names, "kind": kinds, "score": np.arange(20) / 20})


@pytest.fixture
def browser(table, tmp_path) -> MaskBrowser:
    return browser_of(table, tmp_path / "figures")


def shown(browser) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(browser.picture.value)))


def test_every_control_changes_the_picture(browser):
    assert shown(browser).shape == (40, 180, 3), "image, probability and decision at native pixels"
    for control, value in (("threshold", 0.9), ("opacity", 0.2), ("view", "overlay"), ("zoom", 2), ("chosen", 1)):
        before = shown(browser)
        getattr(browser, control).value = value
        after = shown(browser)
        assert before.shape != after.shape or (before != after).any(), control
    assert shown(browser).shape == (80, 120, 3)


def test_views_and_what_is_said_of_them(browser):
    for view in MASK_VIEWS:
        browser.view.value = view
        assert shown(browser).shape[0] == 40
    assert "50.0% flagged" in browser.text.value and "IoU" not in browser.text.value
    browser.forth.click()
    assert "50.0% manipulated, IoU 0.99" in browser.text.value or "IoU 1.000" in browser.text.value
    browser.back.click()
    assert browser.chosen.value == 0
    browser.back.click()
    assert browser.chosen.value == 19, "from the first image back to the last"


def test_filters_and_orders_change_the_list(browser):
    assert [label for label, _ in browser.chosen.options][:2] == ["image 0", "image 1"]
    browser.order.value = "best"
    assert browser.chosen.options[0] == ("image 19", 19)
    assert browser.chosen.value == 19
    browser.filters["kind"].value = "fr"
    assert [index for _, index in browser.chosen.options] == [17, 13, 9, 5, 1]
    browser.filters["kind"].value = "-"
    assert len(browser.chosen.options) == 5
    browser.filters["kind"].value = EVERY
    assert len(browser.chosen.options) == 20


def test_numbers_go_through_the_list(browser):
    browser.number.value = 3
    assert browser.chosen.value == 2
    browser.forth.click()
    assert browser.number.value == 4
    browser.filters["kind"].value = "fr"
    assert (browser.number.value, browser.number.max) == (1, 5)
    browser.number.value = 5
    assert browser.chosen.value == 17


def test_thumbnails_follow_the_choice_and_choose(browser):
    assert len(browser.page.children) == THUMBNAILS
    browser.chosen.value = 17
    assert len(browser.page.children) == 4, "the last page"
    _, button = browser.page.children[2].children
    button.click()
    assert browser.chosen.value == 18


@pytest.mark.parametrize("late", [19, 11, 4])
def test_filters_hold_whatever_image_is_shown(browser, late):
    """From each kind to each other while a late image is shown: list, number, thumbnails and picture belong together."""
    index = {"sp": [0, 3], "fr": [1], "-": [2], EVERY: [0, 1, 2, 3]}
    for kind in ("fr", "sp", "-", EVERY, "-", "fr", "sp"):
        browser.number.value = min(late, browser.number.max)
        browser.filters["kind"].value = kind
        expected = [number for number in range(20) if number % 4 in index[kind]]
        assert [number for _, number in browser.chosen.options] == expected
        assert (browser.chosen.value, browser.number.value, browser.number.max) == (expected[0], 1, len(expected))
        assert len(browser.page.children) == min(THUMBNAILS, len(expected))
        assert browser.page.children[0].children[0].value == browser._thumbnail(browser._table["path"][expected[0]])
        assert shown(browser).shape == (40, 180, 3)


@pytest.fixture
def narrowed(table, tmp_path) -> MaskBrowser:
    """A browser whose two filters fit no image together, with its last image shown before."""
    browser = browser_of(table.assign(side=["left"] * 10 + ["right"] * 10), tmp_path / "figures", ["kind", "side"])
    browser._table.loc[10:, "kind"] = "sp"
    browser.number.value = 20
    return browser


def test_filters_that_fit_nothing_show_nothing(narrowed, tmp_path):
    narrowed.filters["side"].value = "right"
    gone = narrowed.page.children[0].children[1]
    narrowed.filters["kind"].value = "fr"
    assert "no image fits" in narrowed.said.value
    assert (narrowed.chosen.value, narrowed.page.children, narrowed.picture.value, narrowed.text.value) == (None, (), b"", "")
    for button in (gone, narrowed.forth, narrowed.back, narrowed.export):
        button.click()
    narrowed.view.value, narrowed.threshold.value, narrowed.number.value = "overlay", 0.9, 7
    assert narrowed.picture.value == b"" and not (tmp_path / "figures").exists()
    narrowed.filters["kind"].value = EVERY
    assert narrowed.chosen.value == 10
    assert shown(narrowed).size


def test_pictures_are_saved(browser, tmp_path):
    browser.export.click()
    saved = tmp_path / "figures" / "browsed_0.png"
    assert saved.read_bytes() == browser.picture.value
    assert str(saved) in browser.said.value


def test_a_file_that_vanished_is_named(browser, table, tmp_path):
    (tmp_path / "3.png").unlink()
    browser.chosen.value = 3
    assert "3.png: no such file" in browser.text.value
    browser.view.value = "overlay"
    browser.export.click()
    assert browser.picture.value == b"", "not the picture of the image before"
    assert "3.png: no such file" in browser.text.value and not (tmp_path / "figures").exists()
    browser.forth.click()
    assert "flagged" in browser.text.value


def test_a_thousand_images_open_and_step_at_once(table, tmp_path):
    many = pd.concat([table] * 50, ignore_index=True)
    started = time.monotonic()
    browser = browser_of(many, tmp_path / "figures")
    for _ in range(20):
        browser.forth.click()
    browser.order.value = "best"
    assert len(browser.chosen.options) == 1000
    assert browser._thumbnail.cache_info().currsize <= 20, "thumbnails are made for pages that are looked at"
    assert time.monotonic() - started < 60, "a bound for a machine that does much else; it takes about a second"


def test_nothing_to_browse_says_so(table, tmp_path):
    with pytest.raises(ValueError, match="no image"):
        browser_of(table[:0], tmp_path)


def test_browsers_of_a_run(trained, monkeypatch):
    monkeypatch.delenv("FORENSICS_HEADLESS", raising=False)
    for task in ("A", "B"):
        run, manifest = trained(task)
        evaluation = evaluate(run, task, manifest)
        browser = (browse_evaluated_images if task == "A" else browse_evaluated_masks)(run, evaluation)
        assert len(browser.chosen.options) == len(evaluation.table)
        assert not any(" nan " in name for name, _ in browser.chosen.options), "what is not known is not named"
        for order in browser.order.options:
            browser.order.value = order
        for verdict in browser.filters["verdict"].options:
            browser.filters["verdict"].value = verdict
            assert browser.chosen.options
        for view in IMAGE_VIEWS if task == "A" else MASK_VIEWS:
            browser.view.value = view
            assert shown(browser).size
        assert ("probability" if task == "A" else "flagged") in browser.text.value
    browser = browse_test_masks(run, infer(run, "B"))
    assert len(browser.chosen.options) == 4


@pytest.mark.parametrize("browse", [browse_evaluated_images, browse_evaluated_masks, browse_test_masks])
def test_headless_runs_build_no_widgets(browse, tiny_run, monkeypatch):
    monkeypatch.setenv("FORENSICS_HEADLESS", "1")
    monkeypatch.setattr(widgets.Widget, "open", lambda _: pytest.fail("a widget was made"))
    note = browse(tiny_run, None)
    assert not isinstance(note, Browser)
    assert "galleries above" in note.data
