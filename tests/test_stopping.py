import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import TINY

from forensics_lib import epochs, training
from forensics_lib.__main__ import main
from forensics_lib.files import project_root
from forensics_lib.manifest import build_manifest
from forensics_lib.model import read_checkpoint
from forensics_lib.params import Params
from forensics_lib.runs import Run
from forensics_lib.stopping import SIGNALS, stop_requests
from forensics_lib.training import read_metrics, train


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_second_ends(number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stop_requests() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
    assert "once more" in capsys.readouterr().out


def test_other_threads_take_no_signals():
    told = []

    def work():
        with stop_requests() as asked:
            told.append(asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert told == [False]


@pytest.mark.parametrize(("task", "settings"), [("A", {"mixup": 0.4, "dropout": 0.3}), ("B", {"dropout": 0.3})])
def test_a_stopped_training_ends_as_one_that_was_not(task, settings, tiny_data, tmp_path, monkeypatch):
    def begin(home: str) -> Run:
        monkeypatch.setenv("FORENSICS_HOME", str(tmp_path / home))
        return Run(Params(**TINY | {"data_root": str(tiny_data), "epochs_finetune": 2} | settings), tiny_data)

    undisturbed = begin("one")
    expected = train(undisturbed, task, build_manifest(undisturbed, task))

    run, real, calls = begin("two"), epochs.batch_loss, []
    manifest = build_manifest(run, task)

    def loss(*arguments):
        calls.append(None)
        if len(calls) % 3 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(epochs, "batch_loss", loss)
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


def test_a_request_during_the_last_validation_is_heard(tiny_run, monkeypatch):
    manifest, real, calls = build_manifest(tiny_run, "A"), training.validate, []

    def validate(*arguments):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(training, "validate", validate)
    with pytest.raises(KeyboardInterrupt, match="stopped when Task A was trained"):
        train(tiny_run, "A", manifest)
    assert len(train(tiny_run, "A", manifest)) == 2
    assert len(calls) == 2, "nothing was done again"


def test_the_command_line_says_how_to_go_on(tiny_run, monkeypatch, capsys):
    real = epochs.batch_loss

    def loss(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(epochs, "batch_loss", loss)
    assert main(["train", "--params", str(tiny_run.write_params()), "--tasks", "A"]) == 130
    assert "the same command or cell goes on from there" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_stopped_run_keeps_what_it_trained(number, tiny_run):
    run = Run(tiny_run.params.model_copy(update={"epochs_finetune": 500, "tasks": ["A"]}), tiny_run.data)
    command = [sys.executable, "-m", "forensics_lib", "run", "--params", str(run.write_params()), "--from", "02"]
    process = subprocess.Popen(command, cwd=project_root(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while len(read_metrics(run, "A")) < 3:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, output + errors
    assert "Ctrl-C or SIGTERM" in errors
    assert "FROM=02_train_taskA" in errors
    state = read_checkpoint(run.folder / "checkpoints" / "taskA_state.pt")
    assert state["part"] is not None, output
