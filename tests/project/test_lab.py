"""Notebook 04 in a real JupyterLab, driven by headless Chromium: everything runs, and the mask browser answers.

Needs the package playwright and a Chromium (``CHROMIUM``, or on the path); skipped where one of them is missing.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import CHROMIUM

from forensics_lib.utils.files import project_root

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the path, and CHROMIUM names none")]
SECONDS = 120_000  # milliseconds that anything may take


@pytest.fixture
def lab(trained, tmp_path):
    """A JupyterLab on a copy of notebook 04 whose run is trained; gives its address."""
    run, _ = trained("B")
    notebook = json.loads((project_root() / "notebooks" / "04_infer.ipynb").read_text(encoding="utf-8"))
    source = f'# Parameters\nparams_file: str = "{run.write_params()}"\ntasks = ["B"]'
    notebook["cells"][1]["source"] = source.splitlines(keepends=True)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "04_infer.ipynb").write_text(json.dumps(notebook))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        f"--port={port}",
        "--no-browser",
        "--allow-root",
        "--IdentityProvider.token=",
        f"--notebook-dir={tmp_path / 'lab'}",
    ]
    environment = os.environ | {"PYTHONPATH": str(project_root()), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
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


def test_everything_runs_and_the_slider_moves_the_picture(lab):
    pictures = project_root() / "build" / "lab"
    pictures.mkdir(parents=True, exist_ok=True)
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1500, "height": 1200})
        page.set_default_timeout(SECONDS)
        page.goto(f"{lab}/doc/tree/04_infer.ipynb")
        page.wait_for_selector(".jp-Notebook")
        # The indicator in the toolbar is idle before there is a kernel, and cells that are run then are not run at all.
        page.locator("#jp-main-statusbar", has_text="Python 3 (ipykernel) | Idle").wait_for()
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
        page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
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
        page.screenshot(path=pictures / "mask_browser.png")
        page.locator(".jp-Notebook").press("Escape")
        assert (
            page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']", has_text="Traceback").count() == 0
        )
        assert page.locator("text=4 masks, float16").count() == 1, "the last cell has run"
        chromium.close()
    assert Path(pictures / "mask_browser.png").stat().st_size > 20_000


def changed(picture, before: str) -> str:
    """The picture's address once it is another one than before."""
    for _ in range(100):
        if (now := picture.get_attribute("src")) != before:
            return now
        time.sleep(0.1)
    raise AssertionError("the picture did not change")
