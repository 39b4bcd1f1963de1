"""Full disks, folders that cannot be written to, and files that vanish: said clearly, and nothing earlier is lost."""

import errno
import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import picture, save

from forensics_lib.data.manifest import build_manifest
from forensics_lib.evaluation.evaluate import evaluate
from forensics_lib.images.masks import save_mask
from forensics_lib.inference import shards as module
from forensics_lib.inference.shards import infer
from forensics_lib.models.checkpoint import save_checkpoint
from forensics_lib.models.combined import build_model
from forensics_lib.reports.figures import new_figure
from forensics_lib.reports.report import build_report
from forensics_lib.run import Run
from forensics_lib.training.loop import train
from forensics_lib.utils.files import WriteError, atomic_write, write_text

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by the superuser only")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_named_and_leaves_earlier_files_whole(tiny_disk, tiny_run):
    model = build_model(tiny_run.params, "B")
    writes = {
        "a.txt": lambda path: write_text(path, "x" * 500_000),
        "a.npz": lambda path: save_mask(path, np.random.default_rng(0).random((1000, 1000))),
        "a.pth": lambda path: save_checkpoint(path, model),
    }
    for name in writes:
        (tiny_disk / name).write_bytes(b"first")
    (tiny_disk / "filler").write_bytes(bytes(900_000))
    for name, write in writes.items():
        with pytest.raises(WriteError, match=rf"{name} was not written: the disk is full \([\d,]+ bytes are free"):
            write(tiny_disk / name)
        assert (tiny_disk / name).read_bytes() == b"first"
        assert {path.name for path in tiny_disk.iterdir()} == {*writes, "filler"}
    (tiny_disk / "filler").unlink()
    writes["a.txt"](tiny_disk / "a.txt")
    assert len((tiny_disk / "a.txt").read_text()) == 500_000


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to_is_named(code, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(WriteError, match=f"{tmp_path.name} cannot be written to"):
        write_text(tmp_path / "a.txt", "text")


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="of its own") as told, atomic_write(tmp_path / "a.txt"):
        raise RuntimeError("of its own")
    assert not isinstance(told.value, WriteError)


def test_room_for_masks_is_asked_for_before_the_first_one(trained, monkeypatch):
    run, _ = trained("B")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))
    with pytest.raises(WriteError, match=r"4 masks need about 37,800 bytes in .*masks, where 1,000 are free"):
        infer(run, "B")
    assert not list(run.masks.glob("*.npz"))
    monkeypatch.undo()
    monkeypatch.setenv("FORENSICS_HOME", str(run.data.parent))
    assert len(infer(run, "B")) == 4


def test_files_that_vanish_while_training_are_named_and_left_out(tiny_run, capsys):
    manifest = build_manifest(tiny_run, "A")
    gone = manifest[manifest["split"] == "train"]["path"].iloc[0]
    Path(gone).unlink()
    train(tiny_run, "A", manifest)
    assert "could not be read and were left out" in (said := capsys.readouterr().out)
    assert gone in said


def test_a_data_folder_that_vanishes_stops_with_its_name(tiny_run):
    manifest = build_manifest(tiny_run, "A")
    shutil.rmtree(tiny_run.data / "dataset" / "train")
    with pytest.raises(ValueError, match=r"none of the 12 training images could be read.*no such file"):
        train(tiny_run, "A", manifest)


def test_names_from_data_run_nowhere(tiny_run, rng):
    """Sources and files that look like markup or formulas are shown as they are written."""
    evil = "</td><script>alert(1)</script>$\\frac{"
    rows = []
    for split, count in (("train", 6), ("val", 6)):
        for number in range(count):
            name = f"<script>alert({split})<{number}$frac{{.png"
            save(tiny_run.data / "table" / name, picture(rng))
            rows.append({"path": name, "label": number % 2, "split": split, "source": f"{evil}{number % 2}", "generator": evil})
    pd.DataFrame(rows).to_csv(tiny_run.data / "table" / "t.csv", index=False)
    shutil.copy(tiny_run.data / "test" / "taskA" / "a0.jpg", tiny_run.data / "test" / "taskA" / "<script>alert(0)<.jpg")
    (tiny_run.data / "test" / "taskA" / "<img src=x onerror=alert(2)>.jpg").write_bytes(b"broken")
    values = {"run_type": "open", "tasks": ["A"], "data": [{"root": str(tiny_run.data / "table" / "t.csv"), "layout": "table"}]}
    run = Run(type(tiny_run.params)(**tiny_run.params.model_dump() | values), tiny_run.data)
    manifest = build_manifest(run, "A")
    train(run, "A", manifest)
    evaluation = evaluate(run, "A", manifest)
    infer(run, "A")
    figure, axes = new_figure(1, 1, 2, 2)
    axes[0, 0].set_title(evil)
    axes[0, 0].set_xticks([0], [evil])
    figure.canvas.draw()
    for text in (build_report(run).read_text(), evaluation.by("source")._repr_html_()):
        assert "&lt;script&gt;" in text
        assert "<script" not in text
        assert "<img src=x" not in text
