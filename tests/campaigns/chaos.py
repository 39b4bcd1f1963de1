"""Kill a run at random moments and see that the same command finishes it with the same results.

    python tests/campaigns/chaos.py [--kills 50] [--seed 0] [--folder build/chaos]

A small run on made data (both tasks, all five notebooks) is executed once undisturbed.  Then it is started again and again
in a fresh place, and its processes are killed by SIGKILL at a random moment of one notebook after the other, until it has
finished; then from the start, until there were ``--kills`` kills.  Every seventh kill hits the first process alone, so that
the notebook's kernel outlives it for a moment.  After each run that finishes, all CSVs, masks and archives must equal the
undisturbed ones byte for byte; after each kill, every file under its final name must be whole.  Writes ``chaos.json`` into the
folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import TINY, make_tiny_data

from forensics_lib.utils.files import project_root, write_json

HANGS = 10  # times the undisturbed run's length, after which a run counts as hanging
RESULTS = ("outputs/*.csv", "outputs/*/masks/*.npz", "submission/*")


def prepare(folder: Path) -> Path:
    """Data, and parameters of a run that takes some seconds in every stage; returns the parameter file."""
    shutil.rmtree(folder, ignore_errors=True)
    data = make_tiny_data(folder / "data")
    for task, name in (("A", "a"), ("B", "b")):
        images = sorted((data / "test" / f"task{task}").iterdir())
        for number in range(60):
            shutil.copy(images[number % len(images)], images[0].with_name(f"{name}{number:03d}x.jpg"))
    values = TINY | {
        "data_root": str(data),
        "epochs_head": 2,
        "epochs_finetune": 6,
        "robustness_images": 4,
        "run_name": "chaos",
    }
    target = folder / "chaos.yaml"
    target.write_text(yaml.safe_dump(values))
    return target


def environment(home: Path) -> dict[str, str]:
    """The variables of a headless run of this project with its files in ``home``."""
    return os.environ | {"FORENSICS_HOME": str(home), "FORENSICS_HEADLESS": "1", "PYTHONPATH": str(project_root())}


def start(home: Path, params: Path) -> subprocess.Popen:
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "forensics_lib", "run", "--params", str(params)]
    log = (home / "log.txt").open("a")
    return subprocess.Popen(command, env=environment(home), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def descendants(pid: int) -> list[int]:
    """A process and all that it started, also in other sessions."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def kill(process: subprocess.Popen, everything: bool) -> None:
    for pid in descendants(process.pid) if everything else [process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def results(home: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(home)): p.read_bytes() for pattern in RESULTS for p in home.glob(pattern) if p.is_file()}
    return {name: content for name, content in found.items() if not Path(name).name.startswith(".")}


def torn(home: Path) -> list[str]:
    """Files under their final names that cannot be read whole."""
    faults = []
    readers = {
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
        ".csv": pd.read_csv,
        ".parquet": pd.read_parquet,
        ".npz": lambda path: np.load(path)["arr_0"],
        ".pth": lambda path: torch.load(path, weights_only=True),
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".zip": lambda path: zipfile.ZipFile(path).testzip(),
    }
    for path in [*home.glob("outputs/**/*"), *home.glob("submission/*")]:
        if path.is_file() and not path.name.startswith(".") and path.suffix in readers:
            try:
                readers[path.suffix](path)
            except Exception as error:
                faults.append(f"{path}: {type(error).__name__}: {error}")
    return faults


def stage(home: Path) -> str:
    """The notebook that a run began last."""
    return next(reversed(begun(home)), "start")


def begun(home: Path) -> dict[str, int]:
    """The notebooks that a run has begun, and when, in seconds."""
    log = (home / "log.txt").read_text(errors="replace")
    return {name: int(seconds) for name, seconds in re.findall(r"^--- (\w+)  \(.*, (\d+) s so far\)$", log, re.MULTILINE)}


def lengths(home: Path) -> dict[str, float]:
    """The seconds that each notebook of a finished run took."""
    (done,) = re.findall(r"^--- done in (\d+) s", (home / "log.txt").read_text(errors="replace"), re.MULTILINE)
    starts = begun(home)
    times = pairwise([*starts.values(), int(done)])
    return {name: end - start + 1.0 for name, (start, end) in zip(starts, times, strict=True)}


def killed(process: subprocess.Popen, home: Path, notebook: str, wait: float, everything: bool, limit: float) -> bool:
    """Kill a run ``wait`` seconds after it began this notebook; False where it ended before.

    Ends the program where it does neither in ``limit`` seconds.
    """
    end = time.monotonic() + limit
    while stage(home) != notebook:
        if process.poll() is not None:
            return False
        if time.monotonic() > end:
            raise SystemExit(f"{home} hangs")
        time.sleep(0.05)
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        kill(process, everything)
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=project_root() / "build" / "chaos")
    options = parser.parse_args()
    params, rng = prepare(options.folder), random.Random(options.seed)  # noqa: S311 (no secret)
    began = time.monotonic()
    if start(options.folder / "undisturbed", params).wait():
        raise SystemExit(f"the undisturbed run failed: {options.folder / 'undisturbed' / 'log.txt'}")
    took, expected = lengths(options.folder / "undisturbed"), results(options.folder / "undisturbed")
    limit = HANGS * sum(took.values())
    print(f"undisturbed: {took} s, {len(expected)} files to compare", flush=True)
    kills, runs, faults, stages = 0, 0, [], Counter()
    while kills < options.kills:
        home, before = options.folder / f"run{runs}", kills
        while True:
            (home / "log.txt").unlink(missing_ok=True)
            process = start(home, params)
            if kills >= options.kills:
                break
            notebook = list(took)[kills % len(took)]
            wait = rng.uniform(0, took[notebook])
            if not killed(process, home, notebook, wait, everything=kills % 7 != 0, limit=limit):
                break
            kills += 1
            stages[stage(home)] += 1
            found = torn(home)
            faults += found
            print(f"kill {kills} {wait:.1f} s into {notebook}{''.join(f' TORN {one}' for one in found)}", flush=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{home} hangs") from None
        got = results(home)
        differing = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        faults += [f"{home.name}: exit status {status}, see {home / 'log.txt'}"] if status else []
        faults += [f"{home.name}: differs in {', '.join(differing)}"] if differing else []
        equal = f"{len(expected) - len(differing)} of {len(expected)} files equal"
        print(f"{home.name}: finished after {kills - before} kills, {equal}", flush=True)
        runs += 1
        if not differing and not status:
            shutil.rmtree(home)
    facts = {"kills": kills, "runs": runs, "seed": options.seed, "stages": dict(stages), "faults": faults}
    write_json(options.folder / "chaos.json", facts | {"minutes": round((time.monotonic() - began) / 60, 1)})
    print(json.dumps(facts, indent=2))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
