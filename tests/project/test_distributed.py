"""Several processes on one machine, by torchrun's own engine, compared with one process."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TINY, train_and_evaluate

from forensics_lib.data.manifest import build_manifest
from forensics_lib.evaluation import evaluate as evaluation
from forensics_lib.evaluation import metrics
from forensics_lib.evaluation.evaluate import evaluate
from forensics_lib.inference.shards import infer
from forensics_lib.models.checkpoint import read_checkpoint
from forensics_lib.params import Params
from forensics_lib.run import Run
from forensics_lib.training.loop import train
from forensics_lib.training.resume import read_history
from forensics_lib.utils.files import project_root, read_json
from forensics_lib.utils.processes import WorkerError, launch

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
pytestmark = pytest.mark.slow


def torchrun(home: Path, run: Run, *arguments: str, options: tuple[str, ...] = ("--standalone", "--nproc-per-node=2")):
    """Start ``python -m forensics_lib`` in several processes, with the parameters of ``run``."""
    command = [*TORCHRUN, *options, "-m", "forensics_lib", *arguments, "--params", str(run.write_params())]
    environment = os.environ | {"FORENSICS_HOME": str(home), "FORENSICS_HEADLESS": "1", "PYTHONPATH": str(project_root())}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def succeeded(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def run_in(home: Path, data: Path, **values) -> Run:
    return Run(Params(**TINY | {"data_root": str(data)} | values), data)


@pytest.fixture
def homes(tmp_path, tiny_data, monkeypatch):
    """Two places to work in, and what makes one of them the current one."""

    def enter(name: str, **values) -> Run:
        monkeypatch.setenv("FORENSICS_HOME", str(tmp_path / name))
        return run_in(tmp_path / name, tiny_data, **values)

    return enter


def test_two_processes_learn_what_one_does(homes, tmp_path):
    values = {"ema": 0.0, "dropout": 0.0}  # every process draws its own dropout
    one = homes("one", **values)
    for task in "AB":
        train_and_evaluate(one, task)

    two = homes("two", **values)
    assert "2 processes" in succeeded(torchrun(tmp_path / "two", two, "train", "--tasks", "A", "B"))
    for task in "AB":
        alone, together = (read_history(run, task) for run in (one, two))
        columns = ["train_loss", "val_auc"] if task == "A" else ["val_auc", "val_iou"]
        near = 2e-3 if task == "A" else 5e-3  # the IoU is of the two official images, where few pixels count
        pd.testing.assert_frame_equal(together[columns], alone[columns], atol=near, rtol=near)
        weights = [read_checkpoint(run.finetuned_model(task))["model"] for run in (one, two)]
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, atol=2e-3, rtol=2e-2)
        probs = [pd.read_csv(run.val_probs(task)) for run in (one, two)]
        assert probs[0]["image_id"].tolist() == probs[1]["image_id"].tolist()
        scores = [read_json(run.folder / "run.json")[f"task{task}_validation"] for run in (one, two)]
        assert scores[0].keys() == scores[1].keys()


def test_scores_and_predictions_of_two_processes_are_those_of_one(homes, tmp_path, monkeypatch):
    """The same weights: validation scores, thresholds, probabilities and masks are equal to the last bit."""
    for name in ("bootstrap_intervals", "localization_intervals"):  # of as many draws as in the processes
        monkeypatch.setattr(evaluation, name, getattr(metrics, name))
    run = homes("one", precision="bf16")
    for task in "AB":
        train_and_evaluate(run, task)
        infer(run, task)
    kept = {path: path.read_bytes() for path in result_files(run)}
    facts = read_json(run.folder / "run.json")
    assert len(kept) == 1 + 2 * 2 + 4, "thresholds; probabilities; masks"
    for path in [*kept, *(run.folder / "shards").rglob("*.parquet")]:
        path.unlink()
    succeeded(torchrun(tmp_path / "one", run, "train", "--tasks", "A", "B"))  # finished: nothing is trained anew
    succeeded(torchrun(tmp_path / "one", run, "infer", "--tasks", "A", "B"))
    again = read_json(run.folder / "run.json")
    assert all(again[f"task{task}_validation"] == facts[f"task{task}_validation"] for task in "AB")
    assert {path: path.read_bytes() for path in result_files(run)} == kept


def result_files(run: Run) -> list[Path]:
    tables = [place(task) for task in "AB" for place in (run.val_probs, run.test_probs)]
    return [run.thresholds, *tables, *sorted(run.masks.glob("*.npz"))]


def test_training_goes_on_with_another_number_of_processes(homes, tmp_path):
    run = homes("home", epochs_finetune=2)
    first = torchrun(tmp_path / "home", run, "train", "--tasks", "A")
    wait_until(lambda: len(read_history(run, "A")) >= 1 and list(run.folder.rglob("*state.pt")))
    stop(first)
    before = read_history(run, "A")
    assert len(train(run, "A", build_manifest(run, "A"))) == 3
    pd.testing.assert_frame_equal(read_history(run, "A").iloc[: len(before)], before)


def wait_until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


def stop(process: subprocess.Popen) -> None:
    """Kill torchrun with all its workers, as a machine that goes down does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


STOPS_ONCE = """
import os, signal, sys
from forensics_lib.training import epoch as epochs
from forensics_lib.__main__ import main
real, calls = epochs.batch_loss, []
def loss(*arguments):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*arguments)
epochs.batch_loss = loss
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("task", "settings"), [("A", {"batch_size": 4}), ("B", {"batch_size": 2})])
def test_processes_stopped_within_an_epoch_end_as_those_that_were_not(task, settings, homes, tmp_path, tiny_data):
    """Each has its own generators, losses and unreadable images."""
    spoiled = tiny_data / "dataset" / "train" / "1_fake" / "src" / "1_fake0.png"
    data = spoiled.read_bytes()
    spoiled.write_bytes(data[:1000] + bytes(200) + data[1200:])
    values = settings | {"dropout": 0.5, "epochs_head": 1, "epochs_finetune": 1}
    undisturbed = homes("one", **values)
    succeeded(torchrun(tmp_path / "one", undisturbed, "train", "--tasks", task))
    expected = read_history(undisturbed, task)

    run = homes("two", **values)
    script = tmp_path / "stops.py"
    script.write_text(STOPS_ONCE)
    words = [*TORCHRUN, "--standalone", "--nproc-per-node=2", str(script), "train", "--tasks", task]
    environment = os.environ | {"FORENSICS_HOME": str(tmp_path / "two"), "PYTHONPATH": str(project_root())}
    stopped = subprocess.run([*words, "--params", str(run.write_params())], env=environment, capture_output=True, text=True)
    state = read_checkpoint(run.folder / "checkpoints" / f"task{task}_state.pt")
    assert state["part"]["batches"] == 2, stopped.stdout + stopped.stderr
    succeeded(torchrun(tmp_path / "two", run, "train", "--tasks", task))
    columns = ["train_loss", "val_auc", "lr"]
    pd.testing.assert_frame_equal(read_history(run, task)[columns], expected[columns], rtol=1e-9)
    weights = [read_checkpoint(r.finetuned_model(task))["model"] for r in (undisturbed, run)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    facts = [read_json(r.folder / "run.json").get(f"task{task}_unreadable_in_training") for r in (undisturbed, run)]
    assert facts[0] == facts[1] and len(facts[0]) == (task == "A")


def test_a_worker_killed_during_inference_loses_and_doubles_nothing(homes, tmp_path, tiny_data, rng):
    for number in range(120):
        (tiny_data / "test" / "taskA" / f"c{number:03d}.jpg").write_bytes(
            (tiny_data / "test" / "taskA" / "a0.jpg").read_bytes()
        )
    run = homes("home")
    manifest = build_manifest(run, "A")
    train(run, "A", manifest)
    evaluate(run, "A", manifest)
    expected = infer(run, "A")
    shards = next((run.folder / "shards").glob("taskA-*"))
    run.test_probs("A").unlink()
    for shard in shards.iterdir():
        shard.unlink()

    first = torchrun(tmp_path / "home", run, "infer", "--tasks", "A")
    wait_until(lambda: list(shards.glob("0*.parquet")))
    worker = next(pid for pid in children(first.pid) if b"forensics_lib" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    output, _ = first.communicate(timeout=120)
    done = {path: path.stat().st_mtime_ns for path in shards.glob("0*.parquet")}
    if first.returncode == 0:
        pytest.skip("the inference ended before its worker was killed")
    assert not run.test_probs("A").exists(), output

    succeeded(torchrun(tmp_path / "home", run, "infer", "--tasks", "A"))
    assert {path: path.stat().st_mtime_ns for path in done} == done
    written = pd.read_csv(run.test_probs("A"))
    assert written["image_id"].tolist() == expected["image_id"].tolist()
    assert (written["prob"].round(6) == expected["prob"].round(6)).all()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_nodes_meet(homes, tmp_path):
    """Two agents with one process each, as on two machines that see the same files."""
    run = homes("home")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=meeting")
    nodes = [torchrun(tmp_path / "home", run, "train", "--tasks", "A", options=options) for _ in range(2)]
    outputs = [succeeded(node) for node in nodes]
    assert sum("2 processes" in output for output in outputs) == 1
    assert run.val_probs("A").is_file()


def test_a_notebook_hands_the_work_to_processes(homes, capfd):
    run = homes("home", processes=2)
    manifest = build_manifest(run, "A")
    metrics = train(run, "A", manifest)
    assert len(metrics) == 2
    evaluate(run, "A", manifest)
    assert len(infer(run, "A")) == 4
    printed = capfd.readouterr().out
    assert "2 processes" in printed
    assert "finetune 1/1" in printed


def test_a_failed_process_says_why(homes):
    with pytest.raises(WorkerError, match=r"nowhere\.yaml"):
        launch(2, "train", "--params", "nowhere.yaml")


AUDITED = """
import os, sys
from pathlib import Path
from forensics_lib.data import audit as audits
from forensics_lib.training import loop as training
from forensics_lib.utils.processes import main_process_first, join_group, leave_group
from forensics_lib.data.manifest import build_manifest
from forensics_lib.run import open_run

def told(function):
    def call(*arguments, **options):
        with Path(os.environ["FORENSICS_HOME"], "audited.txt").open("a") as file:
            file.write(f"{os.environ['RANK']} {function.__name__}\\n")
        return function(*arguments, **options)
    return call

audits.audit, audits.shortcut_audit = told(audits.audit), told(audits.shortcut_audit)
join_group()
run = main_process_first(lambda: open_run(sys.argv[1]))
training.train(run, "A", main_process_first(lambda: build_manifest(run, "A")))
leave_group()
"""


def test_only_the_first_process_audits(homes, tmp_path):
    run = homes("home")
    script = tmp_path / "audited.py"
    script.write_text(AUDITED)
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", str(script), str(run.write_params())]
    environment = os.environ | {"PYTHONPATH": str(project_root()), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    audited = (tmp_path / "home" / "audited.txt").read_text().splitlines()
    assert set(audited) == {"0 audit", "0 shortcut_audit"}
