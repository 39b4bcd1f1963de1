import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import CORPUS, TINY, needs_corpus, picture, save, square_mask
from PIL import Image

from forensics_lib.data import audit as audits
from forensics_lib.data.audit import (
    SHORTCUT_LIMIT,
    audit,
    balance,
    equalized_audit,
    findings_of,
    mask_areas,
    mask_findings,
    shortcut_audit,
    training_crops,
)
from forensics_lib.data.check import check_data
from forensics_lib.data.manifest import build_manifest, usable
from forensics_lib.images.masks import read_mask
from forensics_lib.params import Degradations, Params, make_params
from forensics_lib.reports import captions
from forensics_lib.reports import data_figures as data_plots
from forensics_lib.run import Run


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
    found = shortcut_audit(table(rng))
    assert not found.found
    assert "no shortcut" in found.message()


@pytest.mark.parametrize(
    ("changes", "fact"),
    [({"format": "WEBP"}, "format"), ({"jpeg_quality": 99.0}, "JPEG quality"), ({"camera": False}, "camera EXIF")],
)
def test_a_fact_that_tells_the_class_is_found_and_named(rng, changes, fact):
    found = shortcut_audit(table(rng, **changes))
    assert found.found
    assert found.facts.index[0] == fact
    assert fact in found.message()


def test_the_audit_does_not_learn_groups(rng):
    """Twenty copies of each photo with its own size: by group there is nothing to learn."""
    rows = table(rng, 20)
    copies = pd.concat([rows] * 20, ignore_index=True)
    assert shortcut_audit(copies).auc < 0.8


def test_too_few_images_give_no_answer(rng):
    assert np.isnan(shortcut_audit(table(rng, 2)).auc)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(
    ("authentic", "positive", "groups"), [(1, 1, 2), (2, 3, 5), (3, 1, 1), (0, 3, 3), (30, 30, 2), (30, 2, 32)]
)
def test_an_audit_of_a_handful_of_images_or_groups_is_no_error(rng, authentic, positive, groups, equal):
    rows = table(rng, 60).sort_values("label")
    rows = pd.concat([rows.head(authentic), rows.tail(positive)])
    rows["group"] = (np.arange(len(rows)) * groups // len(rows)).astype(str)
    if equal:
        rows[["width", "height", "bytes", "jpeg_quality", "format"]] = 100, 100, 1000, 80.0, "JPEG"
    found = shortcut_audit(rows)
    assert np.isnan(found.auc) and not found.found and not found.of_codecs
    assert found.message().startswith("too few images")
    data_plots.shortcut_bars(found, "A").canvas.draw()


@pytest.mark.parametrize("seed", [0, 2**32, 2**40 + 7])
@pytest.mark.parametrize("limit", [60, 61])
def test_an_audit_draws_both_classes_and_takes_any_seed(rng, monkeypatch, seed, limit):
    rows = table(rng, 400)
    rows = pd.concat([rows[rows["label"] == 1], rows[rows["label"] == 0].head(20)])
    drawn = rows.iloc[audits._drawn(rows, limit, seed)]
    assert len(drawn) == limit and (drawn["label"] == 0).sum() == 20, "the rarer class stays whole"
    even = table(rng, 400)
    assert even.iloc[audits._drawn(even, limit, seed)]["label"].value_counts().max() == limit - limit // 2
    monkeypatch.setattr(audits, "AUDIT_ROWS", limit)
    assert 0 <= shortcut_audit(even, seed=seed).auc <= 1


@pytest.mark.slow
@needs_corpus
def test_the_trap_in_real_training_data_is_found():
    manifest = build_manifest(Run(Params(tasks=["A"]), CORPUS), "A")
    found = shortcut_audit(manifest)
    assert found.of_codecs
    rows = usable(manifest, "train")
    crops = training_crops(rows, "A", Params(tasks=["A"]), equalize=True)
    assert equalized_audit(rows, crops).auc <= SHORTCUT_LIMIT
    assert found.auc > 0.9
    assert found.facts["format"] > 0.6
    assert found.facts["aspect ratio"] > 0.9


def test_equalizing_closes_a_codec_shortcut_and_nothing_else_does(tiny_run, rng):
    """Authentic images as PNG, synthetic ones as JPEG, same pixels otherwise."""
    for split, count in (("train", 40), ("val", 2)):
        for label, ending in (("0_real", "png"), ("1_fake", "jpg")):
            folder = tiny_run.data / "dataset" / split / label
            shutil.rmtree(folder)
            for number in range(count):
                save(folder / f"{number}.{ending}", picture(rng))
    rows = usable(build_manifest(tiny_run, "A"), "train")
    found = shortcut_audit(rows)
    assert found.of_codecs and found.auc > 0.95
    assert any("equalize" in remedy for remedy in found.remedies())
    rare = Degradations(**dict.fromkeys(("resize", "blur", "noise", "double_jpeg", "jpeg", "webp", "social"), 0.1))
    params = tiny_run.params.model_copy(update={"degrade": rare})
    left = {on: equalized_audit(rows, training_crops(rows, "A", params, equalize=on)) for on in (True, False)}
    assert left[False].found
    assert left[True].facts["format"] < 0.65 and left[True].facts["JPEG quality"] < 0.65


def test_different_sizes_do_not_ask_for_recompression(rng):
    found = shortcut_audit(table(rng, width=1000, height=1000))
    assert found.found and not found.of_codecs
    assert found.remedies()[0].startswith("size and shape")


def test_every_audit_of_sound_data_finds_nothing_and_of_spoiled_data_says_what(tiny_run):
    assert not audit(tiny_run, "B", build_manifest(tiny_run, "B")).findings["finding"].str.contains("left out|equal").any()
    folder = tiny_run.data / "dataset"
    shutil.copy(folder / "train" / "1_fake" / "src" / "1_fake0.png", folder / "val" / "0_real" / "copy.png")
    (folder / "train" / "1_fake" / "src" / "1_fake1.png").write_bytes(b"")
    (folder / "train" / "1_fake" / "notes.txt").touch()
    manifest = build_manifest(tiny_run, "A")
    found = audit(tiny_run, "A", manifest)
    counts = found.findings.set_index("finding")["count"]
    assert counts["files left out"] == 1 and counts["notes on folders and names"] == 1
    assert counts["equal files in both classes"] == 1 and counts["equal files in several splits"] == 1
    assert "2 files with byte-for-byte duplicates, 1 sets of duplicates across classes" in found.duplicates()
    assert findings_of(tiny_run, "A", manifest) == found.findings.to_dict("records")


def test_findings_of_other_data_are_looked_for_again(tiny_run):
    audit(tiny_run, "A", build_manifest(tiny_run, "A"))
    (tiny_run.data / "dataset" / "train" / "1_fake" / "src" / "1_fake1.png").write_bytes(b"")
    findings = findings_of(tiny_run, "A", build_manifest(tiny_run, "A"))
    assert "files left out" in {found["finding"] for found in findings}


def masks_of(run: Run) -> list[Path]:
    """The masks of the tiny run's TGIF, of which training and validation images share none."""
    return sorted((run.data / "dataset_taskB" / "TGIF" / "masks").rglob("*.png"))


def found_in(run: Run) -> dict[str, tuple[int, str]]:
    rows = audit(run, "B", build_manifest(run, "B")).findings.to_dict("records")
    return {row["finding"]: (row["count"], row["remedy"]) for row in rows}


def test_sound_masks_give_no_finding(tiny_run):
    assert not [finding for finding in found_in(tiny_run) if "mask" in finding or "region" in finding]


@pytest.mark.parametrize(
    ("change", "finding", "told"),
    [
        (lambda mask: 255 - mask, "sets whose regions fill over 60% of an image", "TGIF median 94%"),
        (lambda mask: np.full_like(mask, 255), "sets whose regions fill over 60% of an image", "TGIF median 100%"),
        (lambda mask: mask // 255 * 2, "masks that cannot be used", "0, 2 of 0 to 255"),
        (lambda mask: np.dstack([mask, 0 * mask, 0 * mask]), "masks that cannot be used", "has colours"),
        (lambda mask: np.dstack([0 * mask] * 3 + [mask]), "masks that cannot be used", "alpha channel"),
        (lambda mask: 0 * mask, "masks that mark nothing", "authentic images belong in label 0"),
        (
            lambda mask: np.where(np.eye(*mask.shape) > 0, 90, mask).astype(np.uint8),
            "masks with more than two values",
            "TGIF 12",
        ),
    ],
    ids=["inverted", "white", "values", "colours", "alpha", "empty", "three values"],
)
def test_odd_masks_are_found_before_training(change, finding, told, tiny_run, capsys):
    for path in masks_of(tiny_run):
        save(path, change(np.asarray(Image.open(path))))
    found = found_in(tiny_run)
    assert told in found[finding][1]
    assert [name for name in found if "mask" in name or "region" in name] == [finding]
    count = {"sets": 1}.get(finding.split()[0], len(masks_of(tiny_run)))
    assert found[finding][0] == count
    capsys.readouterr()
    check_data(tiny_run)
    assert f"{tiny_run.data / 'dataset_taskB' / 'TGIF'}: {finding}: {count}" in capsys.readouterr().out


def test_one_odd_mask_among_many_is_no_odd_set(tiny_run):
    path = masks_of(tiny_run)[0]
    save(path, 255 - np.asarray(Image.open(path)))
    assert not any("region" in finding for finding in found_in(tiny_run))


def test_a_manipulated_image_without_a_mask_is_left_out_and_found(tiny_data, tmp_path, rng):
    rows = []
    for split in ("train", "val"):
        for number in range(3):
            image, mask = (save(tmp_path / f"{split}{number}{end}.png", pixels) for end, pixels in
                           (("", picture(rng)), ("_mask", square_mask(48, 56))))  # fmt: skip
            rows += [{"path": image, "label": 1, "mask_path": mask if number else "", "split": split}]
            rows += [{"path": save(tmp_path / f"{split}{number}_real.png", picture(rng)), "label": 0, "split": split}]
    pd.DataFrame(rows).to_csv(tmp_path / "own.csv", index=False)
    values = TINY | {"tasks": ["B"], "run_type": "open", "data": [{"root": str(tmp_path / "own.csv")}]}
    run = Run(make_params(values, "test"), tiny_data)
    manifest = build_manifest(run, "B")
    assert manifest.loc[manifest["error"].notna(), "path"].tolist() == [str(tmp_path / f"{s}0.png") for s in ("train", "val")]
    assert found_in(run)["manipulated images without a mask"][0] == 2


@needs_corpus
def test_real_masks_are_read_as_before_and_give_no_finding():
    manifest = build_manifest(Run(Params(tasks=["B"]), CORPUS), "B")
    masks = mask_areas(manifest)
    assert masks["error"].isna().all() and (masks["values"] == 2).all()
    assert not any(count for _, count, _ in mask_findings(manifest, masks))
    row = manifest[manifest["mask_path"].notna()].iloc[0]
    grey = np.asarray(Image.open(row["mask_path"]).convert("L"))
    assert np.array_equal(read_mask(row["mask_path"], grey.shape), grey > 127)


def test_mask_areas_and_balance(tiny_run):
    manifest = build_manifest(tiny_run, "B")
    areas = mask_areas(manifest)
    assert set(areas["kind"]) == {"sp", "fr"}
    np.testing.assert_allclose(areas["share"], 1 / 16, atol=0.01)
    few = mask_areas(manifest[manifest["split"] == "train"], count=2)
    assert len(few) == 2 and few["method"].nunique() == 2, "of every method"
    assert balance(manifest, "method").loc[("train", "sd2-sp"), "positive"] == 2


@pytest.mark.parametrize("task", ["A", "B"])
def test_every_figure_of_the_data_can_be_drawn(tiny_run, task):
    manifest = build_manifest(tiny_run, task)
    found = audit(tiny_run, task, manifest)
    figures = [data_plots.soundness_bars(found, manifest, task)]
    figures += [data_plots.balance_bars(manifest, task), data_plots.file_distributions(manifest, task)]
    figures += [data_plots.shortcut_bars(found.shortcut, task), data_plots.near_duplicate_pairs(found.near)]
    figures += [data_plots.class_samples(manifest, task), data_plots.spectra(manifest, task)]
    if task == "B":
        figures += [data_plots.region_samples(manifest), data_plots.mask_area_distribution(mask_areas(manifest))]
        figures += [data_plots.forgery_samples(manifest)]
        unknown = data_plots.region_samples(manifest.assign(method=None))
        assert {axis.get_title() for axis in unknown.axes} <= {"manipulated (sp)", "manipulated (fr)", ""}
        figures += [unknown, data_plots.mask_area_distribution(mask_areas(manifest.assign(method=None)))]
    for figure in figures:
        figure.canvas.draw()
    told = [captions.soundness_bars(found, manifest, task), captions.near_duplicate_pairs(found.near)]
    told += [captions.balance_bars(manifest, task), captions.file_distributions(manifest, task)]
    told += [captions.shortcut_bars(found.shortcut, task), captions.spectra(manifest, task)]
    told += [captions.mask_area_distribution(found.masks)]
    assert not any("nan" in sentence for sentence in told)
