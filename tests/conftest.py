"""Small made data in the official layout, and parameters that train on it in seconds."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from forensics_lib.data.manifest import build_manifest
from forensics_lib.evaluation import evaluate as evaluation
from forensics_lib.evaluation import metrics
from forensics_lib.evaluation.evaluate import evaluate
from forensics_lib.images.masks import save_mask
from forensics_lib.models.combined import CombinedModel
from forensics_lib.params import Degradations, Params, make_params
from forensics_lib.reports import compare as comparison
from forensics_lib.run import Run
from forensics_lib.synthesis import sample
from forensics_lib.training import loop
from forensics_lib.training.loop import train
from forensics_lib.utils.files import project_root, update_json, write_csv

signal.signal(signal.SIGINT, signal.default_int_handler)  # which whatever runs in a shell's background would ignore
WARM = multiprocessing.get_context("forkserver")  # its processes are forked from one that has imported the library
LIBRARY = [f"forensics_lib.{name}" for name in ("training.loop", "inference.shards", "reports.compare", "synthesis.sample")]
WARM.set_forkserver_preload([*LIBRARY, "torch.distributed.launcher.api"])
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
TINY = {
    "run_name": "tiny",
    "team": "team",
    "backbone": "test_convnext",
    "pretrained": False,
    "decoder_channels": 16,
    "warmup": 0.1,
    "ema": 0.9998,
    "crop_size": 32,
    "batch_size": 4,
    "epochs_head": 1,
    "epochs_finetune": 1,
    "finetune_stages": "all",
    "crops_per_image": 2,
    "tile_size": 64,
    "device": "cpu",
    "precision": "fp32",
    "workers": 0,
}
OPERATIONS = ("resize", "blur", "noise", "double_jpeg", "jpeg", "webp", "social")
NOTHING, EVERYTHING = (Degradations(**dict.fromkeys(OPERATIONS, probability)) for probability in (0.0, 1.0))
SIZES = {"a.jpg": (20, 30), "b.png": (31, 17)}  # the test images of ``submittable``
CORPUS = Path(os.environ.get("FORENSICS_CORPUS", project_root().parent / "shared" / "corpus"))
OFFICIAL = CORPUS.parent / "official"
needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason=f"no corpus at {CORPUS} (FORENSICS_CORPUS)")
needs_official = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason=f"the official tables are not at {OFFICIAL} (FORENSICS_CORPUS)"
)


def picture(rng: np.random.Generator, height: int = 48, width: int = 56) -> np.ndarray:
    """Noise with some structure, ``(H, W, 3)`` uint8."""
    coarse = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    return (coarse * 0.7 + rng.integers(0, 77, (height, width, 3))).astype(np.uint8)


def mid_greys(rng: np.random.Generator, height: int = 200, width: int = 240) -> np.ndarray:
    """A picture of soft colours with fine detail, far from black and white, where nothing is cut off."""
    noise = rng.normal(size=(height, width, 3))
    coarse, fine = gaussian_filter(noise, (12, 12, 0)), gaussian_filter(noise, (1, 1, 0))
    return (125 + 25 * coarse / coarse.std() + 6 * fine / fine.std()).round().clip(20, 235).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def touch(root: Path, *names: str) -> None:
    """Empty files."""
    for folder in {(root / name).parent for name in names}:
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).touch()


def records(rows) -> list[dict]:
    """What a reader found as dicts, missing values as None."""
    table = rows.table().astype(object)
    return table.where(table.notna(), None).to_dict("records")


def tally(rows, *keys) -> Counter:
    """How many rows there are of each combination of the values of ``keys``."""
    return Counter(tuple(row[key] for key in keys) for row in rows)


def photo_table(paths: list[Path], **columns) -> pd.DataFrame:
    rows = pd.DataFrame({"path": [str(path) for path in paths], "label": 0, "split": "train", "error": None, "data_set": "set"})
    return rows.assign(group=rows["path"], **columns)


def encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, form, **options)
    return buffer.getvalue()


def square_mask(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 255
    return mask


def hub_file(path: Path, rng, *, names: list[str] | None, labels: list, masks: bool = False, rows_in_group: int = 2) -> Path:
    """A parquet file as the hub writes image data sets: encoded images in structs, class names in the metadata."""
    columns = {
        "image": [{"bytes": encoded(picture(rng)), "path": "x.png"} for _ in labels],
        "label": labels,
        "model": ["sd15"] * len(labels),
    }
    if masks:
        columns["mask"] = [{"bytes": encoded(square_mask(48, 56)), "path": "x.png"} for _ in labels]
    table = pa.table(columns)
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_in_group)
    return path


def model(task="B", backbone="test_convnext", **options) -> CombinedModel:
    """A small model with a decoder."""
    return CombinedModel(task, backbone, decoder_channels=16, **options)


def make_tiny_data(root: Path, seed: int = 0) -> Path:
    """A few images for every folder that a run needs."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 6), ("val", 4)):
        for label in ("0_real", "1_fake"):
            for i in range(count):
                save(root / "dataset" / split / label / "src" / f"{label}{i}.png", picture(rng))
    for i in range(4):
        save(root / "test" / "taskA" / f"a{i}.jpg", picture(rng))
        save(root / "test" / "taskB" / f"b{i}.jpg", picture(rng, 70, 90))
    _make_tgif(root / "dataset_taskB" / "TGIF", rng)
    _make_validation(root / "dataset_taskB" / "validation", rng)
    return root


def _make_tgif(root: Path, rng: np.random.Generator) -> None:
    for number, split in enumerate(("training", "validation", "testing")):
        for i in range(2):
            stem = f"{100 * number + i}_mask_bbox"
            save(root / "orig" / split / "cat" / f"{100 * number + i}_orig.png", picture(rng))
            save(root / "sd2-sp" / split / "cat" / f"{stem}.png_ps_mask.png_sd2_0.png", picture(rng))
            save(root / "masks" / split / "cat" / f"{stem}.png_ps_mask.png", square_mask(48, 56))
            save(root / "sd2-fr" / split / "cat" / f"{stem}.png_sd2-512_0.png", picture(rng, 40, 40))
            save(root / "masks" / split / "cat" / f"{stem}_512.png", square_mask(40, 40))


def _make_validation(root: Path, rng: np.random.Generator) -> None:
    rows = []
    for i in range(2):
        save(root / "coco" / "original" / f"{i:012d}.jpg", picture(rng))
        name = f"coco_{i:012d}_brushnet_1"
        save(root / "coco" / "brushnet" / "image" / f"{name}.jpg", picture(rng))
        save(root / "coco" / "brushnet" / "mask" / f"{name}_mask.png", square_mask(48, 56))
        parts = ("brushnet\\image\\" + name + ".jpg", "brushnet\\mask\\" + name + "_mask.png", f"original\\{i:012d}.jpg")
        rows.append(["sagid\\val\\coco\\" + part for part in parts] + ["sp"])
    table = pd.DataFrame(rows, columns=["img_path", "mask_path", "src_path", "type"])
    table.to_csv(root / "taskB_val.csv", index=False, lineterminator="\r\n", encoding="utf-8-sig")


def with_data(run: Run, *entries: dict, **values) -> Run:
    params = make_params(run.params.model_dump() | {"data": list(entries)} | values, "test")
    return Run(params, run.data)


def stopping(
    function: Callable[..., Any], when: Callable[[int], bool], number: int = signal.SIGTERM
) -> tuple[Callable[..., Any], list[None]]:
    """The function with a signal to this process before the calls, counted from 1, for which ``when`` holds; and its calls."""
    calls: list[None] = []

    def call(*arguments: Any) -> Any:
        calls.append(None)
        if when(len(calls)):
            os.kill(os.getpid(), number)
        return function(*arguments)

    return call, calls


def beside(function: Callable[..., Any], *arguments: Any, said: Path) -> BaseProcess:
    """Start a module's function in a process of its own, which begins with this module imported; ``said`` is its output."""
    process = WARM.Process(target=_telling, args=(function, arguments, said, dict(os.environ)))
    process.start()
    return process


def _telling(function: Callable[..., Any], arguments: tuple[Any, ...], said: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    with said.open("w", buffering=1) as sys.stdout:
        function(*arguments)


def wait_until(true: Callable[[], Any], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


def changed(run: Run, **values) -> Run:
    """The run with other parameters."""
    return Run(run.params.model_copy(update=values), run.data)


def train_and_evaluate(run: Run, task: str) -> pd.DataFrame:
    manifest = build_manifest(run, task)
    train(run, task, manifest)
    evaluate(run, task, manifest)
    return manifest


def draw_few(patch: pytest.MonkeyPatch) -> None:
    """Intervals of fewer draws than the library's, but where they are tested themselves."""
    for name in ("bootstrap_intervals", "localization_intervals"):
        patch.setattr(evaluation, name, partial(getattr(metrics, name), rounds=20))
    patch.setattr(comparison, "ROUNDS", 200)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what trains, by a fixture or by a call, as slow."""
    for item in items:
        called = (getattr(item.module, name, None) for name in item.function.__code__.co_names)
        if "trained" in item.fixturenames or {id(train), id(train_and_evaluate)} & set(map(id, called)):
            item.add_marker(pytest.mark.slow)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Containers and texts stand in a test's name as they are written, at most 50 characters of them."""
    if isinstance(val, dict):
        val = " ".join(f"{key}={value}" for key, value in val.items())
    elif isinstance(val, set):
        val = sorted(val, key=str)  # a set's own order is another one in each process
    elif not isinstance(val, list | tuple | str | bytes):
        return None
    text = str(val).encode("unicode_escape").decode()
    return text if len(text) <= 50 else f"{text[:47]}..."


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Nothing that a test writes lands in the project."""
    monkeypatch.setenv("FORENSICS_HOME", str(tmp_path))


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    draw_few(monkeypatch)


@pytest.fixture(autouse=True)
def slow_where_it_trains(request, monkeypatch):
    """``pytest -m "not slow"`` trains nothing."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(loop, "train_epoch", lambda *_: pytest.fail("a test that trains has to be marked slow"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    return make_tiny_data(tmp_path / "data")


@pytest.fixture
def tiny_run(tiny_data: Path) -> Run:
    """A run on tiny data whose outputs go to a scratch folder."""
    return Run(Params(**TINY, data_root=str(tiny_data)), tiny_data)


@pytest.fixture
def homes(tmp_path, tiny_data, monkeypatch) -> Callable[..., Run]:
    """Makes a folder of this name the place of all that is written, and gives a run on tiny or other data there."""

    def enter(name: str, data: Path = tiny_data, **values) -> Run:
        monkeypatch.setenv("FORENSICS_HOME", str(tmp_path / name))
        return Run(Params(**TINY | {"data_root": str(data)} | values), data)

    return enter


@pytest.fixture
def small_sample(monkeypatch):
    """The built-in sample has one crop a photograph: enough to see everything that it is made of."""
    for name in ("TASK_A_COUNTS", "TASK_B_COUNTS", "TASK_B_OFFICIAL"):
        monkeypatch.setattr(sample, name, dict.fromkeys(getattr(sample, name), 1))


@pytest.fixture
def submittable(tiny_run: Run, rng) -> Run:
    """A run with results for two test images per task, as inference leaves them."""
    for task in ("A", "B"):
        for old in tiny_run.test_folder(task).iterdir():
            old.unlink()
        for name, size in SIZES.items():
            save(tiny_run.test_folder(task) / name, picture(rng, *size))
        write_csv(tiny_run.test_probs(task), pd.DataFrame({"image_id": list(SIZES), "prob": [0.9, 0.2]}))
    for name, size in SIZES.items():
        save_mask(tiny_run.masks / f"{Path(name).stem}.npz", rng.random(size))
    update_json(tiny_run.thresholds, A={"threshold": 0.5}, B={"threshold": 0.5, "loc_threshold": 0.25})
    return tiny_run


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> tuple[Path, Path]:
    """The home of runs that are trained once in a session, and where they are kept between tests."""
    return tmp_path_factory.mktemp("home") / "home", tmp_path_factory.mktemp("kept")


@pytest.fixture
def trained(trained_once, monkeypatch) -> Callable[[str], tuple[Run, pd.DataFrame]]:
    """Gives the tiny run, trained and evaluated for tasks, with the last one's manifest; a test may change it at will.

    Always in the same folder, as paths are part of what a run keeps.
    """
    home, kept = trained_once
    run = Run(Params(**TINY, data_root=str(home / "data")), home / "data")
    monkeypatch.setenv("FORENSICS_HOME", str(home))

    def of(tasks: str) -> tuple[Run, pd.DataFrame]:
        shutil.rmtree(home, ignore_errors=True)
        if not (kept / tasks).is_dir():
            make_tiny_data(run.data)
            for task in tasks:
                train_and_evaluate(run, task)
            shutil.copytree(home, kept / tasks)
        else:
            shutil.copytree(kept / tasks, home)
        return run, build_manifest(run, tasks[-1])

    return of
