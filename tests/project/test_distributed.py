"""Several processes on one machine, by torchrun's own engine, compared with one process."""

import os
import shutil
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import pandas as pd
import pytest
import torch
from conftest import WARM, draw_few, stopping, train_and_evaluate
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from forensics_lib.__main__ import main
from forensics_lib.data import audit as audits
from forensics_lib.data.manifest import build_manifest
from forensics_lib.evaluation.evaluate import evaluate
from forensics_lib.inference.shards import infer
from forensics_lib.models.checkpoint import read_checkpoint
from forensics_lib.run import Run
from forensics_lib.training.loop import train
from forensics_lib.training.resume import read_history
from forensics_lib.utils.files import read_json
from forensics_lib.utils.processes import WorkerError, launch

pytestmark = pytest.mark.slow


def begin(home: Path, change: Callable[[], None] | None, arguments: list[str]) -> int:
    os.environ |= {"FORENSICS_HOME": str(home), "FORENSICS_HEADLESS": "1"}
    draw_few(pytest.MonkeyPatch())
    if change:
        change()
    return main(arguments)


@pytest.fixture
def together(tmp_path):
    """Does a command of the library in two processes, by torchrun's engine, on one node or two; gives what they say.

    They begin with the library imported, and with ``change()``.
    """

    def call(run: Run, *arguments: str, change: Callable[[], None] | None = None, status: int = 0, nodes: int = 1) -> str:
        logs = tmp_path / f"logs{len(list(tmp_path.glob('logs*')))}"
        words = [*arguments, "--params", str(run.write_params())]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{probe.getsockname()[1]}"

        def agent(_: int) -> dict[int, int]:
            config = LaunchConfig(nodes, nodes, 2 // nodes, rdzv_backend="c10d", rdzv_endpoint=endpoint, run_id="tests")
            config.max_restarts, config.start_method = 0, WARM.get_start_method()
            config.logs_specs = DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL)
            return elastic_launch(config, begin)(run.folder.parents[1], change, words)

        with ThreadPoolExecutor(nodes) as agents:  # outside of the main thread they leave this process's signals alone
            statuses = [found for of_node in agents.map(agent, range(nodes)) for found in of_node.values()]
        said = sorted(path.read_text() for path in logs.rglob("stdout.log"))
        assert (statuses, said[:-1]) == ([status, status], [""]), said
        return said[-1]

    return call


def signalled(place: str, call: int, number: int, ranks: str) -> None:
    """In the processes of these ranks the function at ``place`` begins its call of this number with a signal to itself."""
    if os.environ["RANK"] in ranks:
        pytest.MonkeyPatch().setattr(place, stopping(resolve_name(place), lambda calls: calls == call, number)[0])


def test_two_processes_learn_what_one_does(homes, together):
    values = {"ema": 0.0, "dropout": 0.0}  # every process draws its own dropout
    one = homes("one", **values)
    for task in "AB":
        train_and_evaluate(one, task)

    two = homes("two", **values)
    assert "2 processes" in together(two, "train", "--tasks", "A", "B")
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


def test_scores_and_predictions_of_two_processes_are_those_of_one(homes, together):
    """The same weights: validation scores, thresholds, probabilities and masks are equal to the last bit."""
    run = homes("one", precision="bf16")
    for task in "AB":
        train_and_evaluate(run, task)
        infer(run, task)
    kept = {path: path.read_bytes() for path in result_files(run)}
    facts = read_json(run.folder / "run.json")
    assert len(kept) == 1 + 2 * 2 + 4, "thresholds; probabilities; masks"
    for path in [*kept, *(run.folder / "shards").rglob("*.parquet")]:
        path.unlink()
    together(run, "train", "--tasks", "A", "B")  # finished: nothing is trained anew
    together(run, "infer", "--tasks", "A", "B")
    again = read_json(run.folder / "run.json")
    assert all(again[f"task{task}_validation"] == facts[f"task{task}_validation"] for task in "AB")
    assert {path: path.read_bytes() for path in result_files(run)} == kept


def result_files(run: Run) -> list[Path]:
    tables = [place(task) for task in "AB" for place in (run.val_probs, run.test_probs)]
    return [run.thresholds, *tables, *sorted(run.masks.glob("*.npz"))]


LOSS = "forensics_lib.training.epoch.batch_loss"


def test_training_goes_on_with_another_number_of_processes(homes, together):
    run = homes("home", epochs_finetune=2)
    with pytest.raises(ChildFailedError):  # as on a machine that goes down
        together(run, "train", "--tasks", "A", change=partial(signalled, LOSS, 5, signal.SIGKILL, "01"))
    before = read_history(run, "A")
    assert len(before) == 1 and list(run.folder.rglob("*state.pt"))
    assert len(train(run, "A", build_manifest(run, "A"))) == 3
    pd.testing.assert_frame_equal(read_history(run, "A").iloc[: len(before)], before)


@pytest.mark.parametrize(("task", "settings"), [("A", {"batch_size": 4}), ("B", {"batch_size": 2})])
def test_processes_stopped_within_an_epoch_end_as_those_that_were_not(task, settings, homes, together, tiny_data):
    """Each has its own generators, losses and unreadable images."""
    spoiled = tiny_data / "dataset" / "train" / "1_fake" / "src" / "1_fake0.png"
    data = spoiled.read_bytes()
    spoiled.write_bytes(data[:1000] + bytes(200) + data[1200:])
    values = settings | {"dropout": 0.5, "epochs_head": 1, "epochs_finetune": 1}
    undisturbed = homes("one", **values)
    together(undisturbed, "train", "--tasks", task)
    expected = read_history(undisturbed, task)

    run = homes("two", **values)
    together(
        run, "train", "--tasks", task, change=partial(signalled, LOSS, 3, signal.SIGTERM, "1"), status=130
    )  # after a probe
    assert read_checkpoint(run.folder / "checkpoints" / f"task{task}_state.pt")["part"]["batches"] == 2
    together(run, "train", "--tasks", task)
    columns = ["train_loss", "val_auc", "lr"]
    pd.testing.assert_frame_equal(read_history(run, task)[columns], expected[columns], rtol=1e-9)
    weights = [read_checkpoint(r.finetuned_model(task))["model"] for r in (undisturbed, run)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    facts = [read_json(r.folder / "run.json").get(f"task{task}_unreadable_in_training") for r in (undisturbed, run)]
    assert facts[0] == facts[1] and len(facts[0]) == (task == "A")


def test_a_worker_killed_during_inference_loses_and_doubles_nothing(homes, together, tiny_data):
    images = tiny_data / "test" / "taskA"
    for number in range(60):
        shutil.copy(images / "a0.jpg", images / f"c{number:03d}.jpg")
    run = homes("home")
    train_and_evaluate(run, "A")
    expected = infer(run, "A")
    shards = next((run.folder / "shards").glob("taskA-*"))
    for path in [run.test_probs("A"), *shards.iterdir()]:
        path.unlink()

    write = "forensics_lib.inference.shards.atomic_write"
    with pytest.raises(ChildFailedError):
        together(run, "infer", "--tasks", "A", change=partial(signalled, write, 3, signal.SIGKILL, "1"))
    done = {path: path.stat().st_mtime_ns for path in shards.glob("0*.parquet")}
    assert 2 <= len(done) < 32 and not run.test_probs("A").exists()

    together(run, "infer", "--tasks", "A")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    written = pd.read_csv(run.test_probs("A"))
    assert written["image_id"].tolist() == expected["image_id"].tolist()
    assert (written["prob"].round(6) == expected["prob"].round(6)).all()


def test_two_nodes_meet(homes, together):
    """Two agents with one process each, as on two machines that see the same files."""
    run = homes("home")
    assert "2 processes" in together(run, "train", "--tasks", "A", nodes=2)
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


def note_audits() -> None:
    def told(function: Callable) -> Callable:
        def call(*arguments, **options):
            with Path(os.environ["FORENSICS_HOME"], "audited.txt").open("a") as file:
                file.write(f"{os.environ['RANK']} {function.__name__}\n")
            return function(*arguments, **options)

        return call

    audits.audit, audits.shortcut_audit = told(audits.audit), told(audits.shortcut_audit)


def test_only_the_first_process_audits(homes, together, tmp_path):
    together(homes("home"), "train", "--tasks", "A", change=note_audits)
    audited = (tmp_path / "home" / "audited.txt").read_text().splitlines()
    assert set(audited) == {"0 audit", "0 shortcut_audit"}
