"""What the file system says of many files, asked in other processes while the folders are still being walked.

This module imports nothing heavy: the processes that it starts are ready at once.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
from loky import cpu_count, get_reusable_executor

_MANY = 2_000  # files in a folder from which on asking in another process pays
LFS = b"version https://git-lfs"  # what stands in place of a file that git-lfs has not downloaded
LFS_POINTER = "a git-lfs pointer and not the file itself: fetch it with git lfs pull"
NOT_UTF8 = (
    "its name is not UTF-8 (its bytes are shown as \\x..): rename it, for example by convmv -r -f cp437 -t utf8 --notest "
    "FOLDER, or unpack its archive again with unzip -O cp437"
)


def shown(path: str | Path) -> str:
    """A path as text that can be stored and printed: bytes that are not UTF-8 become ``\\xe9`` and the like."""
    text = str(path)
    return text if text.isascii() else os.fsencode(text).decode("utf-8", "backslashreplace")


def broken_link(path: str | Path) -> str | None:
    """The link on the way to ``path``, or ``path`` itself, that leads nowhere, and where it leads; None without one."""
    path = Path(path)
    for part in (*reversed(path.parents), path):
        if os.path.islink(part) and not os.path.exists(part):  # noqa: PTH110, PTH114 (which raise for odd names)
            return f"{shown(part)} is a link to {shown(os.path.realpath(part))}, which is not there: is its disk mounted?"
    return None


def why_no_file(path: str) -> str:
    """Why there is no file at ``path``, as ``shown`` gives it, with the remedy."""
    if link := broken_link(path):
        return link
    stored = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), os.fsencode(path))
    if stored != os.fsencode(path) and os.path.exists(stored):  # noqa: PTH110 (of bytes)
        return NOT_UTF8
    return "a folder, not a file" if os.path.isdir(path) else "no such file"  # noqa: PTH112 (which raises for odd names)


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether git-lfs has not downloaded a file."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(LFS)) == LFS
    except OSError:
        return False


def usable_cores() -> int:
    """How many cores this process may use: at most what its affinity, its container's quota and SLURM's allocation allow.

    ``OMP_NUM_THREADS`` does not count: torchrun sets it to 1 for all of its processes, whatever they may use.
    """
    allotted = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or ""
    return max(1, min(cpu_count(), int(allotted))) if allotted.isdecimal() else cpu_count()


def processes() -> Executor:
    """One process per usable core, started when first needed; they end by themselves after some idle seconds."""
    return get_reusable_executor(max_workers=usable_cores())


class Looks:
    """Answers for whole folders, asked ahead of time."""

    def __init__(self) -> None:
        self._asked: dict[str, tuple[list[str], Future]] = {}

    def ask(self, paths: list[str]) -> None:
        """Begin to look at the files of one folder, given in full, where they are many."""
        if len(paths) >= _MANY:
            self._asked[paths[0]] = paths, processes().submit(look, paths)

    def at(self, paths: list[str]) -> np.ndarray:
        """``look`` of any paths, taking what was asked for where it fits."""
        found, start = [np.zeros((0, 3), np.int64)], 0
        for number, path in enumerate(paths):
            if number < start or path not in self._asked:
                continue
            asked, answer = self._asked[path]
            if paths[number : number + len(asked)] == asked:
                found += [look(paths[start:number]), answer.result()]
                start = number + len(asked)
        return np.concatenate([*found, look(paths[start:])])


def look(paths: list[str]) -> np.ndarray:
    """Size in bytes, time of change in ns and identity of each file, ``(N, 3)`` int64; -1 where there is none.

    The same file by two paths has one identity.
    """
    values: list[int] = []
    folder, place = "", None
    for path in paths:
        parent, _, name = path.rpartition(os.sep)
        if parent != folder or place is None:
            _close(place)
            folder, place = parent, _open(parent)
        try:  # asked from an open folder it takes half the time
            found = os.stat(name, dir_fd=place) if place is not None else os.stat(path)  # noqa: PTH116
            values += found.st_size, found.st_mtime_ns, hash((found.st_dev, found.st_ino))
        except OSError:  # reading it will say what is wrong
            values += -1, -1, -1
    _close(place)
    return np.array(values, np.int64).reshape(-1, 3)


def _open(folder: str) -> int | None:
    try:
        return os.open(folder or os.sep, os.O_RDONLY) if os.stat in os.supports_dir_fd else None
    except OSError:
        return None


def _close(place: int | None) -> None:
    if place is not None:
        os.close(place)
