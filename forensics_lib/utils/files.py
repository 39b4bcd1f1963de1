"""Atomic file writes, the project's folders, and readable names of odd paths."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

if TYPE_CHECKING:
    import pandas as pd

DECIMALS = 12  # of numbers in tables, at most
HOST = re.sub(r"[^\w.-]", "", platform.node())[:40]
TEMPORARY = re.compile(r"\..*~(?P<host>[\w.-]*)~\w{8}(\.[^~]*)?")  # names given by ``atomic_write``
ABANDONED = 24 * 3600  # seconds without a change after which another machine's temporary file counts as abandoned
LOCK_SECONDS = 600  # longest wait for other writers in a folder, each of which takes seconds
_again: dict[Path, float] = {}  # when a folder may be searched again


def project_root() -> Path:
    """The checkout's folder: paths start here, since notebooks run in any working directory."""
    return Path(__file__).resolve().parents[2]


def home() -> Path:
    """The parent of ``data``, ``outputs`` and ``submission``: ``FORENSICS_HOME`` if set, else the project's folder.

    Raises ``ValueError`` for a relative path: notebooks run in another directory than the command that starts them.
    """
    chosen = Path(os.environ.get("FORENSICS_HOME") or project_root()).expanduser()
    if not chosen.is_absolute():
        raise ValueError(
            f"FORENSICS_HOME is {str(chosen)!r}, which is another folder in every working directory, and notebooks have "
            f"their own: set it absolute, such as FORENSICS_HOME={shlex.quote(str(chosen.resolve()))}"
        )
    return chosen.resolve()


def from_home(path: str | Path) -> Path:
    """Resolve a path from a parameter: absolute, with ``~``, or relative to ``home()``."""
    return home() / Path(path).expanduser()


def is_main() -> bool:
    """Whether this is the main process, which alone writes results: torchrun numbers the processes in ``RANK``."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` if the block succeeds.

    Raises ``WriteError`` if the disk is full or the folder is not writable.
    """
    temporary = handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        handle, temporary = _held_temporary(path)
        umask = os.umask(0)  # the only way to read it
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        if cause := _why_not_written(path, temporary, error):
            raise WriteError(f"{path} was not written: {cause}. Earlier results are whole; the same command goes on") from error
        raise
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)
        if handle is not None:
            _release(handle)


def _held_temporary(path: Path) -> tuple[int, Path]:
    """Create and lock a file beside ``path``; the lock shows other processes that its writer is alive."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:30]}~{HOST}~", suffix=path.suffix, dir=path.parent)
        with suppress(OSError):  # a file system without locks: nobody can lock the file, so nobody removes it
            fcntl.flock(handle, fcntl.LOCK_EX)
        if Path(name).exists():  # else another process removed it as abandoned before it was locked
            return handle, Path(name)
        os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """Remove temporary files of killed processes; the search takes at most 1% of the running time.

    A lock ends with its process.  Some file systems do not share locks between machines: files from another machine are
    removed only after a day without a change.
    """
    began = time.monotonic()
    if began < _again.get(folder, began):
        return
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        found = [(entry, match) for entry in entries if (match := TEMPORARY.fullmatch(entry.name))]
    for entry, match in found:
        with suppress(OSError):  # locked, or already removed
            if match["host"] == HOST or time.time() - entry.stat().st_mtime > ABANDONED:
                _remove_unlocked(Path(entry))
    _again[folder] = time.monotonic() + 100 * (time.monotonic() - began)


def _remove_unlocked(path: Path) -> None:
    """Remove a file; raises ``OSError`` if a process holds its lock."""
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        _release(handle)


def _release(handle: int) -> None:
    """Unlock, then close: forked processes share the handle, so closing it here would not release the lock."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of a folder, for read-modify-write of its files.

    Must not be nested.  The operating system releases the lock when its process ends, however it ends.  Raises
    ``WriteError`` if the folder is not writable or another process keeps the lock.
    """
    path = folder / ".lock"
    lock = FileLock(path, timeout=LOCK_SECONDS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(poll_interval=0.02)
    except Timeout:
        raise WriteError(f"{path} is held by another process for over {LOCK_SECONDS} s: is one stopped (Ctrl-Z)?") from None
    except OSError as error:
        if cause := _why_not_written(path, None, error):
            raise WriteError(
                f"{path} cannot be locked: {cause}. Earlier results are whole; the same command goes on"
            ) from error
        raise
    try:
        yield
    finally:
        lock.release()


class WriteError(OSError):
    """A file cannot be written; the message names it, the cause and the remedy."""


def _why_not_written(path: Path, temporary: Path | None, error: Exception) -> str | None:
    """The cause if it is the disk or the folder, else None."""
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
        return f"{path.parent} cannot be written to ({error.strerror}); give permission, or choose another place"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if temporary and temporary.exists() and (full or not isinstance(error, OSError)):
        free, written = shutil.disk_usage(path.parent).free, temporary.stat().st_size
        if full or free < 1 << 20:
            return f"the disk is full ({free:,} bytes are free, and more than {written:,} are needed for it); make room"
    return "the disk is full; make room" if full else None


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_traceback(folder: Path, error: BaseException) -> Path:
    """Write an error's traceback to ``traceback.txt`` in a folder, and return its path."""
    path = folder / "traceback.txt"
    write_text(path, "".join(traceback.format_exception(error)))
    return path


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write ``table`` as CSV without its index, floats with six to twelve decimals, atomically."""
    with atomic_write(path) as temporary:
        table.round(DECIMALS).to_csv(temporary, index=False, float_format=decimal_text)


def decimal_text(value: float) -> str:
    """The shortest text that reads back as the same number, with six decimals at least."""
    return np.format_float_positional(value, min_digits=6)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; an empty one if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def update_json(path: Path, **values: Any) -> None:
    """Set keys of the JSON object in ``path``; other keys stay, including those that another process sets at the same time."""
    with locked(path.parent):
        write_json(path, read_json(path) | values)


LFS = b"version https://git-lfs"  # beginning of the pointer that replaces a file until git-lfs downloads it
LFS_POINTER = "a git-lfs pointer and not the file itself: fetch it with git lfs pull"
NOT_UTF8 = (
    "its name is not UTF-8 (its bytes are shown as \\x..): rename it, for example by convmv -r -f cp437 -t utf8 --notest "
    "FOLDER, or unpack its archive again with unzip -O cp437"
)


def shown(path: str | Path) -> str:
    """A path as printable text: bytes that are not UTF-8 become escapes such as ``\\xe9``."""
    text = str(path)
    return text if text.isascii() else os.fsencode(text).decode("utf-8", "backslashreplace")


def plain_stem(path: str | Path) -> str:
    """A file's name without its ending, for the name of another file: at most 80 letters, digits and signs like them."""
    return re.sub(r"[^\w.-]", "_", Path(path).stem)[:80]


def broken_link(path: str | Path) -> str | None:
    """Describe the broken link at or above ``path``, with its target; None if there is none."""
    path = Path(path)
    for part in (*reversed(path.parents), path):
        if os.path.islink(part) and not os.path.exists(part):  # noqa: PTH110, PTH114 (which raise for odd names)
            return f"{shown(part)} is a link to {shown(os.path.realpath(part))}, which is not there: is its disk mounted?"
    return None


def why_no_file(path: str) -> str:
    """Explain why there is no file at ``path`` (as returned by ``shown``), with the remedy."""
    if link := broken_link(path):
        return link
    stored = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), os.fsencode(path))
    if stored != os.fsencode(path) and os.path.exists(stored):  # noqa: PTH110 (of bytes)
        return NOT_UTF8
    return "a folder, not a file" if os.path.isdir(path) else "no such file"  # noqa: PTH112 (which raises for odd names)


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether a file is only a git-lfs pointer, not yet downloaded."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(LFS)) == LFS
    except OSError:
        return False
