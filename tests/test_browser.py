import io

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from forensics_lib.browser import VIEWS, MaskBrowser
from forensics_lib.evaluation import MaskExample


@pytest.fixture
def browser(rng) -> MaskBrowser:
    def load(index: int) -> MaskExample:
        mask = np.linspace(0, 1, 40 * 60).reshape(40, 60).astype(np.float16)
        return MaskExample("", picture(rng, 40, 60), mask, mask > 0.5 if index else None)

    return MaskBrowser(["first", "second"], load, 0.5)


def shown(browser: MaskBrowser) -> np.ndarray:
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
    for view in VIEWS:
        browser.view.value = view
        assert shown(browser).shape[0] == 40
    assert "50.0% flagged" in browser.text.value and "IoU" not in browser.text.value
    browser.forth.click()
    assert "50.0% manipulated, IoU 0.99" in browser.text.value or "IoU 1.000" in browser.text.value
    browser.forth.click()
    assert browser.chosen.value == 0
    browser.back.click()
    assert browser.chosen.value == 1


def test_nothing_to_browse_says_so():
    with pytest.raises(ValueError, match="no image"):
        MaskBrowser([], lambda index: None, 0.5)
