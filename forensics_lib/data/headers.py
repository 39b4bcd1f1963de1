"""Image headers of whole data sets, read in parallel and cached by size and mtime."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from forensics_lib.images.headers import facts_of, hashes_of
from forensics_lib.images.parquet import file_of
from forensics_lib.utils.cores import processes, spread
from forensics_lib.utils.files import atomic_write
from forensics_lib.utils.progress import progress

_MANY = 2_000  # files in a folder from which on another process pays


class Looks:
    """Results of ``look`` for whole folders, computed ahead in other processes."""

    def __init__(self) -> None:
        self._asked: dict[str, tuple[list[str], Future]] = {}

    def ask(self, paths: list[str]) -> None:
        """Start ``look`` for all files of a folder in another process, if they are many."""
        if len(paths) >= _MANY:
            self._asked[paths[0]] = paths, processes().submit(look, paths)

    def at(self, paths: list[str]) -> np.ndarray:
        """``look`` for any paths, with the results asked for where they fit."""
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
    """Size in bytes, mtime in ns and identity of each file, ``(N, 3)`` int64; -1 if there is no file.

    Two paths to one file have one identity.
    """
    values: list[int] = []
    folder, place = "", None
    for path in paths:
        parent, _, name = path.rpartition(os.sep)
        if parent != folder or place is None:
            _close(place)
            folder, place = parent, _open(parent)
        try:  # relative to an open folder it takes half the time
            found = os.stat(name, dir_fd=place) if place is not None else os.stat(path)  # noqa: PTH116
            values += found.st_size, found.st_mtime_ns, hash((found.st_dev, found.st_ino))
        except OSError:  # reading the file will report it
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


FACT_TYPES = dict.fromkeys(("width", "height", "format", "jpeg_quality", "camera", "bytes", "error"), pa.float64())
FACT_TYPES |= {"format": pa.large_string(), "camera": pa.bool_(), "error": pa.large_string()}
FILE_COLUMNS = list(FACT_TYPES)
# Files that are read in one go
_HEADERS, _PIXELS = 500, 200

Reading = Callable[[list[str]], list[tuple]]


def read_headers(paths: list[str], cache: Path, looks: Looks | None = None) -> pd.DataFrame:
    """``FILE_COLUMNS`` and ``identity`` of each path, from headers; ``error`` says why a file cannot be read.

    ``looks`` may have results for the files already.
    """
    return _cached(paths, cache, looks or Looks(), FACT_TYPES, facts_of, _HEADERS, "reading headers")


def image_hashes(paths: list[str], cache: Path) -> pd.Series:
    """The perceptual hash of each image as UInt64; missing for unreadable and flat images."""
    return _cached(paths, cache, Looks(), {"hash": pa.uint64()}, hashes_of, _PIXELS, "hashing images")["hash"]


def _cached(
    paths: list[str], cache: Path, looks: Looks, types: dict[str, pa.DataType], read: Reading, chunk: int, title: str
) -> pd.DataFrame:
    """The columns of ``types`` for each path, from ``cache`` if size and mtime are unchanged, else read and cached."""
    size, time, identity = looks.at([file_of(path) if "#" in path else path for path in paths]).T
    keys = pa.table({"path": pa.array(paths, pa.large_string()), "size": size, "time": time, "identity": identity})
    known = _load(cache, pa.schema([*keys.schema, *(pa.field(name, kind) for name, kind in types.items())]))
    rows = _rows_of(keys, known)
    if len(rows) == len(known) and (rows == np.arange(len(rows))).all():
        return _as_pandas(known.select(list(types)), keys)
    new = np.flatnonzero(rows < 0)
    unread = keys.column("path").take(pa.array(new)).to_pylist()
    chunks = [unread[i : i + chunk] for i in range(0, len(unread), chunk)]
    values = list(chain.from_iterable(progress(spread(read, chunks), title, total=len(chunks))))
    columns = zip(*values, strict=True) if values else [()] * len(types)
    fresh = pa.table({name: pa.array(list(column), kind) for (name, kind), column in zip(types.items(), columns, strict=True)})
    rows[new] = np.arange(len(new)) + len(known)
    facts = pa.concat_tables([known.select(list(types)), fresh]).take(pa.array(rows))
    table = pa.table({name: part.column(name) for part in (keys, facts) for name in part.column_names})
    with atomic_write(cache) as temporary:
        pq.write_table(table, temporary)
    return _as_pandas(facts, keys)


def _as_pandas(facts: pa.Table, keys: pa.Table) -> pd.DataFrame:
    return facts.append_column("identity", keys.column("identity")).to_pandas(types_mapper=pandas_type)


def _load(cache: Path, schema: pa.Schema) -> pa.Table:
    """The cached facts; an empty table if there are none, or those of another version."""
    with suppress(OSError, pa.ArrowException):
        table = pq.read_table(cache)
        if table.column_names == schema.names:
            return table
    return schema.empty_table()


def _rows_of(keys: pa.Table, known: pa.Table) -> np.ndarray:
    """For each key the row of ``known`` with the same path, size and mtime, else -1; files with errors are read again."""
    if keys.column("path").equals(known.column("path")):
        rows = np.arange(len(keys))
    else:
        then = pd.Index(known.column("path").to_pandas(types_mapper=pandas_type))
        first = np.flatnonzero(~then.duplicated())
        rows = then[first].get_indexer(keys.column("path").to_pandas(types_mapper=pandas_type))
        rows = np.where(rows < 0, -1, first[rows] if len(first) else -1)
    usable = np.ones(len(known), bool)
    if "error" in known.column_names:
        usable = known.column("error").is_null().to_numpy()
    same = np.append(usable, False)[rows]
    for name in ("size", "time"):
        same &= keys.column(name).to_numpy() == np.append(known.column(name).to_numpy(), -2)[rows]
    return np.where(same, rows, -1)


def pandas_type(kind: pa.DataType) -> pd.StringDtype | pd.UInt64Dtype | None:
    """The pandas types of Arrow columns: text stays in Arrow memory, hashes keep all their bits."""
    if pa.types.is_large_string(kind):
        return pd.StringDtype("pyarrow", na_value=np.nan)
    return pd.UInt64Dtype() if pa.types.is_uint64(kind) else None
