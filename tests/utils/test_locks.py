"""A run that is already being trained elsewhere is waited for, not trained twice."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from filelock import FileLock

from forensics_lib.training.loop import train
from forensics_lib.training.resume import epoch_lines, only_trainer, read_history
from forensics_lib.utils import locks as attach
from forensics_lib.utils.locks import SIGNALS, stop_requests

HOLD = """
import sys, time
from filelock import FileLock
FileLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_training_elsewhere_is_shown_and_taken_up(trained, monkeypatch, capsys):
    run, manifest = trained("A")
    expected = read_history(run, "A")
    capsys.readouterr()
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text(lines[0])
    elsewhere = FileLock(run.folder / "checkpoints" / "taskA.lock")
    elsewhere.acquire()

    def looked(_seconds: float) -> None:
        run.metrics.write_text("".join(lines))
        if "finetune 1/1" in (told := capsys.readouterr().out):
            elsewhere.release()
        shown.append(told)

    shown: list[str] = []
    monkeypatch.setattr(attach.time, "sleep", looked)
    metrics = train(run, "A", manifest)
    assert metrics.equals(expected)
    assert "being trained by another process" in shown[0]
    assert "".join(shown).count("head 1/1") == 1
    assert "taking up the training" in capsys.readouterr().out


def test_epochs_that_begin_after_the_first_look_are_all_shown(tiny_run, monkeypatch, capsys):
    (tiny_run.folder / "checkpoints").mkdir(parents=True)
    elsewhere = FileLock(tiny_run.folder / "checkpoints" / "taskA.lock")
    elsewhere.acquire()
    told: list[str] = []

    def looked(_seconds: float) -> None:
        if len(told) == 3:
            elsewhere.release()
        told.append(f"epoch {len(told) + 1}")

    monkeypatch.setattr(attach.time, "sleep", looked)
    with only_trainer(tiny_run, "A", lambda: list(told)):
        assert capsys.readouterr().out.splitlines()[1:] == ["epoch 1", "epoch 2", "epoch 3"]


def test_interrupting_the_wait_leaves_the_other_alone(tiny_run, monkeypatch):
    lock = FileLock(tiny_run.folder / "checkpoints" / "taskA.lock")
    tiny_run.folder.joinpath("checkpoints").mkdir(parents=True)
    lock.acquire()

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(attach.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt), only_trainer(tiny_run, "A", list):
        pass
    assert lock.is_locked
    assert read_history(tiny_run, "A").empty


def test_a_killed_trainer_keeps_nobody_out(tiny_run):
    path = tiny_run.folder / "checkpoints" / "taskA.lock"
    path.parent.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        other.kill()
        other.wait()
    began = time.monotonic()
    with only_trainer(tiny_run, "A", list):
        assert time.monotonic() - began < 30


def test_epochs_of_a_training_that_replaces_another_are_shown_from_its_first_on(tiny_run, monkeypatch, capsys):
    (tiny_run.folder / "checkpoints").mkdir(parents=True)
    elsewhere = FileLock(tiny_run.folder / "checkpoints" / "taskA.lock")
    elsewhere.acquire()
    looks = iter([["old 1", "old 2"], [], ["new 1"], ["new 1", "new 2"], ["new 1", "new 2"]])

    def epochs() -> list[str]:
        lines = next(looks)
        if lines[-1:] == ["new 2"]:
            elsewhere.release()
        return lines

    monkeypatch.setattr(attach.time, "sleep", lambda _seconds: None)
    with only_trainer(tiny_run, "A", epochs):
        assert capsys.readouterr().out.splitlines()[3:] == ["new 1", "new 2"]


def test_epochs_of_the_training_before_are_not_shown_as_those_of_one_without_an_epoch(trained):
    run, _ = trained("A")
    assert len(epoch_lines(run, "A")) == 2
    (run.folder / "checkpoints" / "begun").mkdir()
    (run.folder / "checkpoints" / "begun" / "taskB_head_best.pth").touch()
    assert len(epoch_lines(run, "A")) == 2
    (run.folder / "checkpoints" / "begun" / "taskA_head_best.pth").touch()
    assert epoch_lines(run, "A") == []


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
