"""The check of a GPU, in its small form on the CPU."""

import json
from itertools import product

import gpu_check
import pandas as pd
import pytest
import torch


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch):
    """What the command sets for its own process is taken back."""
    monkeypatch.setenv("FORENSICS_HEADLESS", "1")


@pytest.mark.slow
def test_the_check_of_a_gpu_passes_on_a_cpu(small_sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "check_training", trains := counted(gpu_check.check_training))
    status = gpu_check.main(["--device", "cpu", "--small", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert status == 0, capsys.readouterr().out
    assert trains.calls == 2
    assert found["resume"] == {"after SIGTERM": True, "after SIGKILL": True, "passed": True}
    assert found["answers A"]["passed"] and found["answers B"]["passed"]
    assert found["answers B"]["fp32"] == 0, "a CPU answers as itself"
    for task, job in product("AB", ("inference", "training")):
        assert found["speed"][f"Task {task}, {job}: images/s"] > 0
        assert 0 < found["speed"][f"Task {task}, {job}: share of matrix products"] < 2


def counted(function):
    def call(*arguments):
        call.calls += 1
        return function(*arguments)

    call.calls = 0
    return call


def test_a_check_that_fails_fails_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "checks", lambda _: {"train A": {"passed": True}, "resume": {"passed": False}})
    assert gpu_check.main(["--device", "cpu", "--small", "--out", str(tmp_path / "found.json")]) == 1
    assert "FAILED: resume" in capsys.readouterr().out


def test_answers_that_are_too_far_from_the_cpu_fail(monkeypatch):
    values = {"cpu": 0.5, "auto": 0.52}
    monkeypatch.setattr(
        gpu_check, "answers", lambda *_, precision, device: [torch.tensor([values.get(precision, values["cpu"])]).numpy()]
    )
    monkeypatch.setattr(gpu_check, "build_manifest", lambda *_: None)
    monkeypatch.setattr(gpu_check, "usable", lambda *_: pd.DataFrame({"path": ["a"]}))
    run = type("Run", (), {"params": type("Params", (), {"device": "cpu"})})
    found = gpu_check.check_answers(run, "A", 1)
    assert not found["passed"] and found["auto"] > 0.01 and found["fp32"] == 0
