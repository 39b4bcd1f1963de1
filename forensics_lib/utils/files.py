"""Writing files whole or not at all, and finding the project's folders."""

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

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    import pandas as pd

HOST = re.sub(r"[^\w.-]", "", platform.node())[:40]
TEMPORARY = re.compile(r"\..*~(?P<host>[\w.-]*)~\w{8}(\.[^~]*)?")  # the names that ``atomic_write`` gives
ABANDONED = 24 * 3600  # seconds without a change after which another machine's temporary file has no writer
LOCK_SECONDS = 600  # longest wait for others that change files in a folder, each for seconds
_again: dict[Path, float] = {}  # when a folder may be looked through again


def project_root() -> Path:
    """The checkout's folder: notebooks run from anywhere, so paths start here and not at the working directory."""
    return Path(__file__).resolve().parents[2]


def home() -> Path:
    """Where ``data``, ``outputs`` and ``submission`` lie: the project, or ``FORENSICS_HOME`` where that is set.

    Raises ``ValueError`` where that is relative: notebooks run in another folder than the command that starts them.
    """
    chosen = Path(os.environ.get("FORENSICS_HOME") or project_root()).expanduser()
    if not chosen.is_absolute():
        raise ValueError(
            f"FORENSICS_HOME is {str(chosen)!r}, which is another folder in every working directory, and notebooks have "
            f"their own: set it absolute, such as FORENSICS_HOME={shlex.quote(str(chosen.resolve()))}"
        )
    return chosen.resolve()


def from_home(path: str | Path) -> Path:
    """A path as a parameter names it: absolute, with ``~``, or counted from ``home()``."""
    return home() / Path(path).expanduser()


def is_main() -> bool:
    """Whether this process writes what its group found: torchrun numbers the processes of a group in ``RANK``."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to; rename it to ``path`` only when the block ends well.

    Raises ``WriteError`` where the disk is full or the folder cannot be written to.
    """
    temporary = handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        handle, temporary = _held_temporary(path)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by a RuntimeError
        if cause := _why_not_written(path, temporary, error):
            raise WriteError(f"{path} was not written: {cause}. Earlier results are whole; the same command goes on") from error
        raise
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)
        if handle is not None:
            _release(handle)


def _held_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside ``path`` and a handle of it; it is locked, so that others see that its writer lives."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:30]}~{HOST}~", suffix=path.suffix, dir=path.parent)
        with suppress(OSError):  # a file system without locks: what nobody can lock, nobody removes
            fcntl.flock(handle, fcntl.LOCK_EX)
        if Path(name).exists():  # else another process took it for abandoned before it was locked
            return handle, Path(name)
        os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of processes that were killed; looking for them takes a hundredth of the time at most.

    The lock of a process ends with it.  Not every file system tells locks to other machines: what one of those wrote goes
    only when it was not changed for a day.
    """
    began = time.monotonic()
    if began < _again.get(folder, began):
        return
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        found = [(entry, match) for entry in entries if (match := TEMPORARY.fullmatch(entry.name))]
    for entry, match in found:
        with suppress(OSError):  # locked, or gone meanwhile
            if match["host"] == HOST or time.time() - entry.stat().st_mtime > ABANDONED:
                _remove_unlocked(Path(entry))
    _again[folder] = time.monotonic() + 100 * (time.monotonic() - began)


def _remove_unlocked(path: Path) -> None:
    """Remove a file; raises ``OSError`` where a process holds its lock."""
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        _release(handle)


def _release(handle: int) -> None:
    """Unlock and close: processes that were forked meanwhile have the handle too, and closing alone unlocks nothing then."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block no other process is in such a block of this folder: for whoever reads a file, changes and writes it.

    Not to be nested.  The lock is the system's and ends with the process that holds it, however that ends.  Raises
    ``WriteError`` where the folder cannot be written to, or another process keeps the lock.
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
    """A file cannot be written; the message says which, why, and what is needed."""


def _why_not_written(path: Path, temporary: Path | None, error: Exception) -> str | None:
    """The cause where it lies with the disk or the folder, else None."""
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
        return f"{path.parent} cannot be written to ({error.strerror}); give permission, or choose another place"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if temporary and temporary.exists() and (full or not isinstance(error, OSError)):
        free, written = shutil.disk_usage(path.parent).free, temporary.stat().st_size
        if full or free < 1 << 20:
            return f"the disk is full ({free:,} bytes are free, and more than {written:,} are needed for it); make room"
    return "the disk is full; make room" if full else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_traceback(folder: Path, error: BaseException) -> Path:
    """Write an error's traceback to ``traceback.txt`` in a folder, and return its path."""
    path = folder / "traceback.txt"
    write_text(path, "".join(traceback.format_exception(error)))
    return path


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write ``table`` as CSV without its index, floats with six decimals, whole or not at all."""
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6f")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, or an empty one where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def update_json(path: Path, **values: Any) -> None:
    """Set some keys of the JSON object in ``path`` and keep the others, also those that another process sets meanwhile."""
    with locked(path.parent):
        write_json(path, read_json(path) | values)


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
