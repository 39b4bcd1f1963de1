"""Notebooks 02 to 04 in a real JupyterLab, driven by headless Chromium: everything runs, and their widgets answer.

Needs the package playwright and a Chromium (``CHROMIUM``, or on the path); skipped where one of them is missing.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import CHROMIUM, save
from conftest import picture as picture_of

from forensics_lib.utils.files import project_root

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the path, and CHROMIUM names none")]
SECONDS = 120_000  # milliseconds that anything may take


@contextmanager
def jupyterlab(folder: Path, config: Path) -> Iterator[str]:
    """A JupyterLab on a folder, with the environment of now; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        f"--port={port}",
        "--no-browser",
        "--allow-root",
        "--IdentityProvider.token=",
        f"--notebook-dir={folder}",
    ]
    environment = os.environ | {"PYTHONPATH": str(project_root()), "JUPYTER_CONFIG_DIR": str(config)}
    environment.pop("FORENSICS_HEADLESS", None)
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environment, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5)  # noqa: S310 (our own server)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def opened(trained, tmp_path):
    """Opens a notebook on a run that is trained for a task, runs all its cells, and gives the page."""
    with ExitStack() as stack:
        driver = stack.enter_context(sync_api.sync_playwright())
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        stack.callback(chromium.close)

        def opening(name: str, task: str):
            run, _ = trained(task)
            notebook = json.loads((project_root() / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
            source = f'# Parameters\nparams_file: str = "{run.write_params()}"\ntasks = ["{task}"]'
            notebook["cells"][1]["source"] = source.splitlines(keepends=True)
            (tmp_path / "lab").mkdir()
            (tmp_path / "lab" / f"{name}.ipynb").write_text(json.dumps(notebook))
            address = stack.enter_context(jupyterlab(tmp_path / "lab", tmp_path / "config"))
            page = chromium.new_page(viewport={"width": 1500, "height": 1200})
            page.set_default_timeout(SECONDS)
            page.goto(f"{address}/doc/tree/{name}.ipynb")
            page.wait_for_selector(".jp-Notebook")
            # The indicator in the toolbar is idle before there is a kernel, and cells that are run then are not run at all.
            page.locator("#jp-main-statusbar", has_text="Python 3 (ipykernel) | Idle").wait_for()
            page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
            page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
            return page

        yield opening


def shot(page, name: str) -> None:
    """Keep a picture of the page in ``build/lab``; no cell may have ended in an error."""
    pictures = project_root() / "build" / "lab"
    pictures.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=pictures / f"{name}.png")
    assert (pictures / f"{name}.png").stat().st_size > 20_000
    errors = page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']", has_text="Traceback")
    assert errors.count() == 0


def test_everything_runs_and_the_slider_moves_the_picture(opened):
    page = opened("04_infer", "B")
    page.locator(".widget-select select").wait_for()
    picture = page.locator("img.widget-image, .widget-image img").last
    picture.scroll_into_view_if_needed()
    before = picture.get_attribute("src")

    value = page.locator(".widget-readout").first
    value.click()
    page.keyboard.press("Control+A")
    page.keyboard.type("0.99")
    page.keyboard.press("Enter")
    after = changed(picture, before)
    page.locator(".widget-text input[type=number]").focus()
    page.keyboard.press("ArrowUp")  # the next image, by keyboard
    changed(picture, after)
    page.locator(".jp-Notebook").press("Escape")
    shot(page, "mask_browser")
    assert page.locator("text=4 masks, float16").count() == 1, "the last cell has run"


@pytest.mark.parametrize(("name", "task"), [("02_train_taskA", "A"), ("03_train_taskB", "B")])
def test_the_browser_of_a_training_notebook_goes_to_the_next_image(name, task, opened):
    page = opened(name, task)
    forth = page.locator("button", has_text="next").first
    forth.wait_for()
    picture = page.locator("img.widget-image, .widget-image img").last
    picture.scroll_into_view_if_needed()
    before = picture.get_attribute("src")
    forth.click()
    changed(picture, before)
    shot(page, f"browser_{name}")


def test_own_pictures_are_judged_and_what_is_none_is_told(opened, tmp_path, rng):
    save(tmp_path / "holiday.png", picture_of(rng, 90, 70))
    (tmp_path / "letter.txt").write_text("no picture")
    page = opened("04_infer", "A")
    button = page.locator("button", has_text="choose pictures")
    button.wait_for()
    with page.expect_file_chooser() as chooser:
        button.click()
    chooser.value.set_files([tmp_path / "holiday.png", tmp_path / "letter.txt"])
    page.locator("h3", has_text="holiday.png").wait_for()
    page.locator("p", has_text="Not read").wait_for()
    page.locator("td", has_text="saved as JPEG of quality 85").first.wait_for()
    shot(page, "own_pictures")


def changed(picture, before: str) -> str:
    """The picture's address once it is another one than before."""
    for _ in range(100):
        if (now := picture.get_attribute("src")) != before:
            return now
        time.sleep(0.1)
    raise AssertionError("the picture did not change")
