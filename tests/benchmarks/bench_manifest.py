"""How fast a manifest of many files is built, first and from its cache, and in how much memory.

    python tests/benchmarks/bench_manifest.py [files] [folder]

Makes ``files`` (600,000) tiny JPEG and PNG images in CNNDetection's layout, then builds the manifest five times, each
in a process of its own: once with no cache, four times with one.  Prints a table and writes ``bench_manifest.json``
in the working directory.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from forensics_lib.data.readers import CNNDETECTION_CATEGORIES
from forensics_lib.utils.cores import usable_cores

MEASURE = """
import json, resource, sys, time
from pathlib import Path
from forensics_lib.data.manifest import build_manifest
from forensics_lib.params import make_params
from forensics_lib.run import Run
run = Run(make_params({"data": [{"root": sys.argv[1], "layout": "cnndetection"}]}, "bench"), Path(sys.argv[1]))
seconds = []
for _ in range(2):
    start = time.perf_counter()
    rows = len(build_manifest(run, "A"))
    seconds.append(time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps({"rows": rows, "seconds": seconds[0], "again": seconds[1], "peak_gb": peak}))
"""


def make_files(root: Path, count: int) -> None:
    """``count`` images of a few hundred bytes in 80 folders."""
    rng, contents = np.random.default_rng(0), []
    for i in range(40):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (8 + i, 16, 3), dtype=np.uint8)).save(buffer, "JPEG" if i % 2 else "PNG")
        contents.append(buffer.getvalue())
    for number in range(count):
        split, category, label = ("train", "val")[number % 80 >= 40], number % 20, ("0_real", "1_fake")[number // 20 % 2]
        folder = root / split / sorted(CNNDETECTION_CATEGORIES)[category] / label
        if number < 80:
            folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:07d}.{'jpg' if number % 2 else 'png'}").write_bytes(contents[number % 40])


def measure(root: Path, home: Path) -> dict[str, float]:
    environment = os.environ | {"FORENSICS_HOME": str(home), "FORENSICS_HEADLESS": "1"}
    command = [sys.executable, "-c", MEASURE, str(root)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 600_000
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    try:
        make_files(folder / "data", count)
        first, *cached = [measure(folder / "data", folder / "home") for _ in range(5)]
    finally:
        shutil.rmtree(folder)
    cold, warm = (statistics.median(run[key] for run in cached) for key in ("seconds", "again"))
    peak = max(run["peak_gb"] for run in [first, *cached])
    result = {
        "machine": f"{platform.machine()}, {usable_cores()} cores",
        "python": platform.python_version(),
        "files": first["rows"],
        "first_files_per_second": round(first["rows"] / first["seconds"]),
        "cached_seconds_new_process": round(cold, 2),
        "cached_seconds_same_process": round(warm, 2),
        "peak_memory_gb": round(peak, 2),
    }
    for name, value in result.items():
        print(f"{name:30} {value}")
    Path("bench_manifest.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
