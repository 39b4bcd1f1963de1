"""The report is one small page that needs nothing else, fits a phone and can be read by everybody."""

import base64

import numpy as np
import pytest
from conftest import CHROMIUM

from forensics_lib.data.manifest import build_manifest
from forensics_lib.evaluation.evaluate import evaluate, evaluate_robustness
from forensics_lib.reports import figures as plots
from forensics_lib.reports import report
from forensics_lib.reports.figures import save_figure
from forensics_lib.reports.report import build_report
from forensics_lib.training.resume import read_history

PHONE = {"width": 390, "height": 844}


def test_a_gallery_and_a_chart_get_small(tiny_run, rng):
    figure, axes = plots.new_figure(3, 4, 12, 9)
    for axis in axes.flat:
        axis.imshow(rng.integers(0, 256, (300, 300, 3), np.uint8))
    save_figure(tiny_run, figure, "gallery")
    figure, axes = plots.new_figure(1, 1, 6, 4)
    axes[0, 0].plot(rng.random(50), label="score")
    save_figure(tiny_run, figure, "chart")
    for name, share in (("gallery", 0.5), ("chart", 1.0)):
        path = tiny_run.folder / "figures" / f"{name}.png"
        assert len(base64.b64decode(report.picture_of(path))) < share * path.stat().st_size


@pytest.fixture
def page_of_a_run(trained):
    """The report of a small run of both tasks, opened at the width of a phone; and what the page asked for elsewhere."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    if not CHROMIUM:
        pytest.skip("no Chromium on the path, and CHROMIUM names none")
    run, _ = trained("AB")
    for task in "AB":
        manifest = build_manifest(run, task)
        evaluation = evaluate(run, task, manifest)
        save_figure(run, plots.learning_curves(read_history(run, task), task), f"task{task}_learning")
        save_figure(run, plots.score_curves(evaluation, task), f"task{task}_validation")
        sweep = evaluate_robustness(run, task, manifest)
        save_figure(run, plots.robustness_curves(sweep, task), f"task{task}_robustness")
    path = build_report(run)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=PHONE)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        yield page, asked
        browser.close()


@pytest.mark.slow
def test_the_page_fits_a_phone_asks_for_nothing_and_is_accessible(page_of_a_run):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page, asked = page_of_a_run
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.locator("script").count() == 0
    assert page.locator("img").count() == 6
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0 && image.alt.length > 10)")
    found = axe.Axe().run(page)  # adds its script to the page, so it comes last
    wrong = {rule["id"]: [node["html"] for node in rule["nodes"]][:3] for rule in found.response["violations"]}
    assert wrong == {}
