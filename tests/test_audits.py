import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import picture, save
from PIL import Image

from forensics_lib.audits import SHORTCUT_LIMIT, equalized_audit, exact_duplicates, groups_across_splits, shortcut_audit
from forensics_lib.files import project_root
from forensics_lib.images import read_header
from forensics_lib.manifest import build_manifest, usable
from forensics_lib.params import Params
from forensics_lib.runs import Run
from forensics_lib.training import training_crops

CORPUS = Path(os.environ.get("FORENSICS_CORPUS", project_root().parent / "shared" / "corpus"))


def table(rng, count: int = 200, **changes) -> pd.DataFrame:
    """Images whose file facts say nothing of their class, but for ``changes``, which hold for the synthetic ones."""
    labels = np.arange(count) % 2
    rows = pd.DataFrame(
        {
            "path": [f"{i}.jpg" for i in range(count)],
            "label": labels,
            "split": "train",
            "group": [str(i) for i in range(count)],
            "width": rng.integers(200, 900, count),
            "height": rng.integers(200, 900, count),
            "format": rng.choice(["JPEG", "PNG"], count),
            "jpeg_quality": rng.uniform(60, 95, count),
            "camera": rng.random(count) < 0.5,
            "bytes": rng.integers(20_000, 90_000, count),
            "error": None,
        }
    )
    for name, value in changes.items():
        rows.loc[labels == 1, name] = value
    return rows


def test_classes_with_the_same_facts_have_no_shortcut(rng):
    audit = shortcut_audit(table(rng))
    assert not audit.found
    assert "no shortcut" in audit.message()


@pytest.mark.parametrize(
    ("changes", "fact"),
    [({"format": "WEBP"}, "format"), ({"jpeg_quality": 99.0}, "JPEG quality"), ({"camera": False}, "camera EXIF")],
)
def test_a_fact_that_tells_the_class_is_found_and_named(rng, changes, fact):
    audit = shortcut_audit(table(rng, **changes))
    assert audit.found
    assert audit.facts.index[0] == fact
    assert fact in audit.message()


def test_the_audit_does_not_learn_groups(rng):
    """Twenty copies of each photo with its own size: by group there is nothing to learn."""
    rows = table(rng, 20)
    copies = pd.concat([rows] * 20, ignore_index=True)
    assert shortcut_audit(copies).auc < 0.8


def test_too_few_images_give_no_answer(rng):
    assert np.isnan(shortcut_audit(table(rng, 2)).auc)


def test_exact_duplicates_within_and_across_splits(tmp_path, rng):
    first = save(tmp_path / "a.png", picture(rng))
    paths = [first, tmp_path / "b.png", save(tmp_path / "c.png", picture(rng))]
    paths[1].write_bytes(first.read_bytes())
    rows = pd.DataFrame(
        {"path": [str(p) for p in paths], "label": [0, 1, 0], "split": ["train", "val", "train"], "error": None}
    )
    rows["bytes"] = [path.stat().st_size for path in paths]
    found = exact_duplicates(rows)
    assert found["path"].tolist() == [str(paths[0]), str(paths[1])]
    assert set(found["set"]) == {0}


def test_photos_in_two_splits():
    rows = pd.DataFrame({"group": ["a", "a", "b"], "split": ["train", "val", "val"], "error": None})
    assert groups_across_splits(rows).index.tolist() == ["a"]


@pytest.mark.parametrize("quality", [35, 60, 75, 90, 97])
def test_jpeg_quality_is_estimated_from_the_header(quality, tmp_path, rng):
    Image.fromarray(picture(rng)).save(tmp_path / "x.jpg", quality=quality)
    assert abs(read_header(tmp_path / "x.jpg").jpeg_quality - quality) <= 1.5


def test_a_camera_is_known_by_its_exif(tmp_path, rng):
    image = Image.fromarray(picture(rng))
    exif = image.getexif()
    exif[0x0110] = "a camera"
    image.save(tmp_path / "x.jpg", exif=exif)
    image.save(tmp_path / "y.png")
    assert read_header(tmp_path / "x.jpg").camera
    assert not read_header(tmp_path / "y.png").camera
    assert read_header(tmp_path / "y.png").jpeg_quality is None


@pytest.mark.skipif(not CORPUS.is_dir(), reason=f"no corpus at {CORPUS} (FORENSICS_CORPUS)")
def test_the_trap_in_real_training_data_is_found():
    manifest = build_manifest(Run(Params(tasks=["A"]), CORPUS), "A")
    audit = shortcut_audit(manifest)
    assert audit.of_codecs
    rows = usable(manifest, "train")
    crops = training_crops(rows, "A", Params(tasks=["A"]), equalize=True, seed=0)
    assert equalized_audit(rows, crops).auc <= SHORTCUT_LIMIT
    assert audit.auc > 0.9
    assert audit.facts["format"] > 0.6
    assert audit.facts["aspect ratio"] > 0.9


def test_equalizing_closes_a_codec_shortcut_and_nothing_else_does(tiny_run, rng):
    """Authentic images as PNG, synthetic ones as JPEG, same pixels otherwise."""
    for split, count in (("train", 40), ("val", 2)):
        for label, ending in (("0_real", "png"), ("1_fake", "jpg")):
            folder = tiny_run.data / "dataset" / split / label
            shutil.rmtree(folder)
            for number in range(count):
                save(folder / f"{number}.{ending}", picture(rng))
    rows = usable(build_manifest(tiny_run, "A"), "train")
    audit = shortcut_audit(rows)
    assert audit.of_codecs and audit.auc > 0.95
    assert any("equalize" in remedy for remedy in audit.remedies())
    left = {on: equalized_audit(rows, training_crops(rows, "A", tiny_run.params, equalize=on, seed=0)) for on in (True, False)}
    assert left[False].found
    assert left[True].facts["format"] < 0.65 and left[True].facts["JPEG quality"] < 0.65


def test_different_sizes_do_not_ask_for_recompression(rng):
    audit = shortcut_audit(table(rng, width=1000, height=1000))
    assert audit.found and not audit.of_codecs
    assert audit.remedies()[0].startswith("size and shape")
