import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import changed, stopping, wait_until
from PIL import Image

from forensics_lib.__main__ import main
from forensics_lib.data.manifest import build_manifest
from forensics_lib.models.checkpoint import load_model, read_checkpoint
from forensics_lib.run import Run
from forensics_lib.training import epoch as epochs
from forensics_lib.training import loop as training
from forensics_lib.training.loop import train
from forensics_lib.training.resume import _difference, read_history, training_inputs
from forensics_lib.utils.files import project_root


@pytest.mark.parametrize("task", ["A", "B"])
def test_a_stopped_training_ends_as_one_that_was_not(task, homes, monkeypatch):
    undisturbed = homes("one", epochs_finetune=2, dropout=0.3)
    expected = train(undisturbed, task, build_manifest(undisturbed, task))

    run = homes("two", epochs_finetune=2, dropout=0.3)
    manifest = build_manifest(run, task)
    monkeypatch.setattr(epochs, "batch_loss", stopping(epochs.batch_loss, lambda call: call % 3 == 0)[0])
    stops = 0
    while True:
        try:
            metrics = train(run, task, manifest)
            break
        except KeyboardInterrupt as stopped:
            assert "goes on from there" in str(stopped)
            stops += 1
    assert stops
    weights = [read_checkpoint(r.finetuned_model(task))["model"] for r in (undisturbed, run)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    columns = ["step", "epoch", "train_loss", "val_auc", "lr"]
    assert metrics[columns].equals(expected[columns])


@pytest.mark.parametrize(
    ("task", "backbone", "levels"),
    [
        ("A", "test_convnext", False),
        ("A", "test_vit", True),
        ("A", "test_vit", "tokens"),
        ("B", "test_convnext", False),
        ("B", "test_convnext", "mask"),
    ],
)
def test_a_training_goes_on_with_the_levels_that_it_began_with(task, backbone, levels, tiny_run, monkeypatch):
    tiny_run = changed(tiny_run, backbone=backbone)
    manifest, build, loss = build_manifest(tiny_run, task), training.build_model, epochs.batch_loss
    monkeypatch.setattr(training, "build_model", lambda params, task, **_: build(params, task, levels=levels))
    monkeypatch.setattr(epochs, "batch_loss", stopping(loss, lambda call: call == 4)[0])
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run, task, manifest)
    monkeypatch.setattr(training, "build_model", build)
    monkeypatch.setattr(epochs, "batch_loss", loss)
    assert len(train(tiny_run, task, manifest)) == 2
    model, _ = load_model(tiny_run.finetuned_model(task), task)
    assert model.config["levels"] == levels
    assert model.sees_tokens == (levels == "tokens")


def test_corrected_masks_are_trained_on(tiny_run, capsys):
    manifest = build_manifest(tiny_run, "B")
    train(tiny_run, "B", manifest)
    before = training_inputs(tiny_run.params, "B", manifest)
    Image.fromarray(255 - np.asarray(Image.open(path := manifest["mask_path"].dropna().iloc[0]))).save(path)
    now = training_inputs(tiny_run.params, "B", manifest)
    assert {key for key in now if now[key] != before[key]} == {"masks"}
    state = {"trained_with": before}
    assert "masks" in _difference(tiny_run, "B", state, now)
    del before["masks"]
    assert _difference(tiny_run, "B", state, now) is None, "earlier versions did not record them"


def test_a_request_during_the_last_validation_is_heard(tiny_run, monkeypatch):
    manifest = build_manifest(tiny_run, "A")
    validate, calls = stopping(training.validate, lambda call: call == 2)
    monkeypatch.setattr(training, "validate", validate)
    with pytest.raises(KeyboardInterrupt, match="stopped when Task A was trained"):
        train(tiny_run, "A", manifest)
    assert len(train(tiny_run, "A", manifest)) == 2
    assert len(calls) == 2, "nothing was done again"


@pytest.mark.parametrize("ended", [KeyboardInterrupt, OSError])
def test_an_epoch_whose_validation_does_not_end_is_not_trained_again(ended, tiny_run, monkeypatch):
    run = changed(tiny_run, epochs_finetune=2)
    manifest, columns = build_manifest(run, "A"), ["step", "epoch", "train_loss", "val_auc", "lr"]
    expected = train(run, "A", manifest)[columns]
    (run.folder / "checkpoints" / "taskA_state.pt").unlink()
    validate, train_epoch, done = training.validate, training.train_epoch, []

    def fails_first(*arguments):
        done.append("validation")
        if done.count("validation") == 2:
            raise ended
        return validate(*arguments)

    def epoch(*arguments):
        done.append("epoch")
        return train_epoch(*arguments)

    monkeypatch.setattr(training, "validate", fails_first)
    monkeypatch.setattr(training, "train_epoch", epoch)
    with pytest.raises(ended):
        train(run, "A", manifest)
    assert train(run, "A", manifest)[columns].equals(expected)
    assert done == ["epoch", "validation", "epoch", "validation", "validation", "epoch", "validation"]


@pytest.mark.slow
def test_the_command_line_says_how_to_go_on(tiny_run, monkeypatch, capsys):
    real = epochs.batch_loss

    def loss(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(epochs, "batch_loss", loss)
    assert main(["train", "--params", str(tiny_run.write_params()), "--tasks", "A"]) == 130
    assert "the same command or cell goes on from there" in capsys.readouterr().err


@pytest.fixture
def command(tiny_run):
    """Starts ``python -m forensics_lib`` on a long training, waits for three epochs, and kills what the test leaves."""
    started = []

    def start(*arguments, **changes) -> tuple[Run, subprocess.Popen]:
        run = changed(tiny_run, **{"epochs_finetune": 500, "tasks": ["A"]} | changes)
        words = [sys.executable, "-m", "forensics_lib", *arguments, "--params", str(run.write_params())]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        process = subprocess.Popen(words, cwd=project_root(), **options)
        started.append(process)
        wait_until(lambda: len(read_history(run, "A")) >= 3 or process.poll() is not None)
        assert process.poll() is None
        return run, process

    yield start
    for process in started:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_stopped_run_keeps_what_it_trained(number, processes, command):
    run, process = command("run", "--from", "02", workers=2, processes=processes)
    process.send_signal(number)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 130, output + errors
    assert "Ctrl-C or SIGTERM" in errors
    assert "FROM=02_train_taskA" in errors
    state = read_checkpoint(run.folder / "checkpoints" / "taskA_state.pt")
    assert state["part"] is not None, output


@pytest.mark.slow
def test_processes_that_train_together_say_what_they_kept(command):
    _, process = command("train", processes=2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C does
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 130, output + errors
    assert errors.startswith("stopped in finetune epoch"), output + errors
