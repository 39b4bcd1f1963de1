"""Any picture gets an answer or the reason why not, and where common changes turn the decision, it is called unsure."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, encoded, picture
from PIL import Image

from forensics_lib.__main__ import main
from forensics_lib.images.io import read_image
from forensics_lib.inference.predictor import Answer, Item, Predictor, predict
from forensics_lib.models.checkpoint import save_checkpoint
from forensics_lib.models.combined import CombinedModel
from forensics_lib.reports import pictures
from forensics_lib.reports.browser import NO_PICTURES, browse_own_pictures
from forensics_lib.reports.pictures import CHANGES, Verdict

KEYS = ("crop_size", "crops_per_image", "tile_size", "precision")
JPEG65 = "saved as JPEG of quality 65"


@pytest.fixture(params=["A", "B"])
def checkpoint(request, tiny_run) -> Path:
    """A model that was never trained, where the run's own would be."""
    torch.manual_seed(0)
    model = CombinedModel(request.param, "test_convnext", decoder_channels=16)
    thresholds = {"threshold": 0.5, "temperature": 1.0, "loc_threshold": 0.5}
    path = tiny_run.finetuned_model(request.param)
    save_checkpoint(path, model, thresholds=thresholds, inference={key: TINY[key] for key in KEYS}, sample=True)
    return path


@pytest.fixture
def inputs(tmp_path, rng) -> list[str]:
    """What people try first."""
    root = tmp_path / "inputs"
    photo = Image.fromarray(picture(rng, 60, 80))
    exif = photo.getexif()
    exif[0x0112] = 6
    files = {
        "phone.jpg": encoded(photo, "JPEG", exif=exif),
        "screenshot.png": encoded(photo.convert("RGBA").rotate(30)),
        "pixel.png": encoded(photo.crop((0, 0, 1, 1))),
        "moving.gif": encoded(photo, "GIF", save_all=True, append_images=[photo.rotate(90)]),
        "notes.txt": b"hello",
        "empty.jpg": b"",
        "folder/a.png": encoded(photo),
        "folder/notes.txt": b"hello",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "nothing").mkdir()
    names = [name for name in files if "/" not in name]
    return [str(root / name) for name in (*names, "folder", "nothing", "missing.jpg")]


def test_every_first_try_gets_an_answer_or_a_reason(checkpoint, inputs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", *inputs, "--checkpoint", str(checkpoint), "--out", str(out), "--report"]) == 0
    said = capsys.readouterr().out
    table = pd.read_csv(out / "predictions.csv").set_index("path")
    table.index = [Path(path).name for path in table.index]
    answered = ["phone.jpg", "screenshot.png", "pixel.png", "moving.gif", "a.png"]
    assert table.index.tolist() == [*answered[:4], "notes.txt", "empty.jpg", "a.png", "nothing", "missing.jpg"]
    assert table["prob"].notna().tolist() == table["error"].isna().tolist() == table.index.isin(answered).tolist()
    assert table["unsure"].notna().tolist() == table["label"].notna().tolist() == table["prob"].notna().tolist()
    assert table.filter(like="prob, ").loc[answered].notna().all(axis=None) and len(table.filter(like="prob, ").columns) == 4
    for name, reason in {
        "notes.txt": "not an image",
        "empty.jpg": "empty",
        "nothing": "no images",
        "missing.jpg": "no such",
    }.items():
        assert reason in table.loc[name, "error"] and f"{name}: Not read. " in said
    for name, note in {"phone.jpg": "EXIF", "screenshot.png": "transparency", "moving.gif": "first of its 2 frames"}.items():
        assert note in next(line for line in said.splitlines() if line.startswith(f"{name}: "))
    assert "smaller than the 32 pixels" in said and "9 pictures, " in said and "4 not read" in said
    page = (out / "predictions.html").read_text()
    assert page.count("data:image/webp;base64,") == 5 and "http" not in page and "<script" not in page
    assert "knows no real generator" in page and all(name in page for name in table.index)


def test_the_answers_and_masks_are_those_of_predict(checkpoint, inputs, tmp_path):
    assert main(["predict", inputs[0], inputs[3], "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    found = pd.read_csv(tmp_path / "out" / "predictions.csv")
    expected, masks = predict([inputs[0], inputs[3]], checkpoint)
    assert np.allclose(found["prob"], expected["prob"], atol=1e-6) and found["label"].tolist() == expected["label"].tolist()
    assert not (tmp_path / "out" / "predictions.html").exists()
    assert ("mask" in found) == bool(masks)
    for (path, mask), name in zip(masks.items(), found.get("mask", ()), strict=True):
        written = np.asarray(Image.open(tmp_path / "out" / name))
        assert Path(path).stem in name and written.shape == read_image(path).shape[:2]
        assert np.array_equal(written > 0, mask >= 0.5) and set(np.unique(written)) <= {0, 255}


def test_nothing_that_can_be_read_is_a_failure(checkpoint, inputs, tmp_path, capsys):
    assert main(["predict", inputs[4], "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]) == 1
    assert "not an image" in capsys.readouterr().out and (tmp_path / "out" / "predictions.csv").is_file()


def test_without_a_checkpoint_the_way_to_one_is_told(tiny_run, tmp_path, capsys):
    assert main(["predict", "a.jpg", "--out", str(tmp_path / "out")]) == 1
    assert "`make run-constrained` trains both tasks" in capsys.readouterr().err
    found = tiny_run.finetuned_model("A")
    found.parent.mkdir(parents=True, exist_ok=True)
    found.touch()
    assert main(["predict", "a.jpg", "--out", str(tmp_path / "out"), "--checkpoint", "wrong.pth"]) == 1
    assert f"no checkpoint wrong.pth. There are\n  {found}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "unsure", "words"),
    [
        ({JPEG65: 0.8}, False, "Synthetic (probability 0.700, threshold 0.500). The decision holds after every change"),
        (
            {JPEG65: 0.2},
            True,
            f"Unsure: synthetic as it is (probability 0.700, threshold 0.500), but authentic when {JPEG65} (0.200)",
        ),
        ({JPEG65: np.nan}, False, "Synthetic (probability 0.700, threshold 0.500). Not tried: too large."),
    ],
)
def test_an_answer_in_words(changed, unsure, words, checkpoint):
    def answer(prob: float) -> Answer:
        known = np.isfinite(prob)
        return Answer("a.jpg", prob, int(prob >= 0.5) if known else None, None if known else "too large", None)

    predictor = Predictor(checkpoint)
    verdict = Verdict(Item("a.jpg"), answer(0.7), {name: answer(prob) for name, prob in changed.items()})
    if predictor.task == "B":
        words = words.replace("Synthetic", "Manipulated").replace("synthetic", "manipulated")
    assert bool(verdict.flips) == unsure
    assert words in verdict.sentence(predictor)
    assert (' class="unsure"' in pictures.as_html([verdict], predictor)) == unsure


def uploaded(path: Path) -> dict:
    content = path.read_bytes()
    facts = {"name": path.name, "type": "", "size": len(content), "last_modified": datetime.now(UTC)}
    return facts | {"content": memoryview(content)}


def test_the_widget_answers_uploads_and_paths(checkpoint, tiny_run, inputs, monkeypatch):
    monkeypatch.delenv("FORENSICS_HEADLESS", raising=False)
    task = "B" if "taskB" in checkpoint.name else "A"
    box = browse_own_pictures(type(tiny_run)(tiny_run.params.model_copy(update={"tasks": [task]}), tiny_run.data))
    box.upload.value = tuple(uploaded(Path(path)) for path in (inputs[0], inputs[4]))
    html = box.answers.value
    assert "<h3>phone.jpg</h3>" in html and "data:image/webp;base64," in html and "EXIF" in html
    assert "Not read. notes.txt: not an image" in html, "no folder of ours is named"
    assert all(name in html for name in CHANGES)
    box.path.value = inputs[6]
    assert "<h3>a.png</h3>" in box.answers.value and "phone.jpg" not in box.answers.value
    box.path.value = inputs[7]
    assert "no images in the folder or below" in box.answers.value


def test_headless_runs_build_no_widget(tiny_run, monkeypatch):
    monkeypatch.setenv("FORENSICS_HEADLESS", "1")
    assert browse_own_pictures(tiny_run).data == NO_PICTURES
