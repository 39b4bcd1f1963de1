"""Infer many small and many large images, and see that memory, open files and threads stay what they were.

    python tests/campaigns/load.py [--small 20000] [--large 200] [--megapixels 24 6] [--folder build/load]

A small model is trained on made data; then ``forensics_lib infer`` predicts ``--small`` images of 56 x 48 pixels (Task A) and
``--large`` images of so many megapixels (Task A and Task B).  Memory, open files and threads of all its processes are read
from the system four times a second; the last quarter of a job's time is compared with its second quarter.  Writes
``load.json`` into the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from chaos import descendants, environment
from conftest import TINY, make_tiny_data, picture

from forensics_lib.utils.files import project_root, write_json

GROWTH = 1.10  # how much more memory the last quarter may take than the second


def prepare(folder: Path, small: int, large: int, megapixels: list[float]) -> dict[str, dict[str, Any]]:
    """The jobs' parameters; the images of a job are hard links to a few files."""
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    values = TINY | {"data_root": str(make_tiny_data(folder / "data")), "workers": 2, "tile_size": 512}
    jobs = {f"A, {small} small": values | {"test_folder_a": str(linked(folder / "small", small, rng, 48, 56))}}
    for task, size in zip("AB", megapixels, strict=True):
        side = round((size * 1e6) ** 0.5)
        test = str(linked(folder / f"large{task}", large, rng, side, side))
        jobs[f"{task}, {large} of {size:g} megapixels"] = values | {f"test_folder_{task.lower()}": test}
    return jobs


def linked(folder: Path, count: int, rng: np.random.Generator, height: int, width: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        path = folder / f"{number:06d}.jpg"
        if number < 4:
            Image.fromarray(picture(rng, height, width)).save(path, quality=90)
        else:
            os.link(folder / f"{number % 4:06d}.jpg", path)
    return folder


def watched(command: list[str], home: Path) -> tuple[pd.DataFrame, float]:
    """Run a command; what its processes held, by time, and the seconds that it took.  Ends the program where it fails."""
    began, held = time.monotonic(), []
    with (home / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment(home), stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            held.append({"seconds": time.monotonic() - began} | total(descendants(process.pid)))
            time.sleep(0.25)
    if process.returncode:
        raise SystemExit((home / "log.txt").read_text())
    return pd.DataFrame(held), time.monotonic() - began


def total(pids: list[int]) -> dict[str, float]:
    """Memory (proportional set size, shared pages counted once), open files and threads of processes, summed."""
    sums = {"gb": 0.0, "files": 0, "threads": 0}
    for pid in pids:
        with suppress(OSError, StopIteration, IndexError):
            entry = Path(f"/proc/{pid}")
            lines = (entry / "smaps_rollup").read_text().splitlines()
            sums["gb"] += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e6
            sums["files"] += len(list((entry / "fd").iterdir()))
            sums["threads"] += len(list((entry / "task").iterdir()))
    return sums


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=20_000)
    parser.add_argument("--large", type=int, default=200)
    parser.add_argument("--megapixels", type=float, nargs=2, default=[24.0, 6.0], help="of large images, Task A and Task B")
    parser.add_argument("--folder", type=Path, default=project_root() / "build" / "load")
    options = parser.parse_args()
    rows, grown = [], []
    for name, values in prepare(options.folder, options.small, options.large, options.megapixels).items():
        params, task = options.folder / "load.yaml", name[0]
        params.write_text(yaml.safe_dump(values))
        base = [sys.executable, "-m", "forensics_lib"]
        watched([*base, "train", "--params", str(params), "--tasks", task], options.folder)
        held, seconds = watched([*base, "infer", "--params", str(params), "--tasks", task], options.folder)
        quarter = np.floor(4 * held["seconds"] / held["seconds"].max())
        early, late = held[quarter == 1].max(), held[quarter == 3].iloc[:-8].max()  # the last two seconds close the job
        images = options.small if "small" in name else options.large
        row = {"job": name, "seconds": seconds, "images/s": images / seconds, "peak GB": held["gb"].max()}
        rows.append(
            row | {f"{key}, {when}": part[key] for key in early.index[1:] for when, part in (("2/4", early), ("4/4", late))}
        )
        if late["gb"] > GROWTH * early["gb"] or late["files"] > early["files"] + 4 or late["threads"] > early["threads"] + 4:
            grown.append(name)
        print(pd.DataFrame(rows).round(2).T.to_string(header=False), flush=True)
    write_json(options.folder / "load.json", {"jobs": rows, "grown": grown})
    print(json.dumps({"grown": grown}))
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
