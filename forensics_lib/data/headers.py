"""What files say of themselves, read in parallel and kept: a file is read again only when its size or time changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from forensics_lib.data.layouts import pandas_type
from forensics_lib.images.io import facts_of, hashes_of
from forensics_lib.images.parquet import file_of
from forensics_lib.utils.disk import Looks, processes
from forensics_lib.utils.files import whole
from forensics_lib.utils.progress import progress

FACT_TYPES = {
    "width": pa.float64(),
    "height": pa.float64(),
    "format": pa.large_string(),
    "jpeg_quality": pa.float64(),
    "camera": pa.bool_(),
    "bytes": pa.float64(),
    "error": pa.large_string(),
}
FILE_COLUMNS = list(FACT_TYPES)
# Files that a process reads at a time; of fewer the reading is done before other processes have started
_HEADERS, _PIXELS = 4_000, 200

Reading = Callable[[list[str]], list[tuple]]


def file_facts(paths: list[str], cache: Path, looks: Looks | None = None) -> pd.DataFrame:
    """``FILE_COLUMNS`` and ``identity`` of each path, by headers alone; ``error``, else missing, says why it cannot be read.

    ``looks`` may have begun to look at the files.
    """
    return _kept(paths, cache, looks or Looks(), FACT_TYPES, facts_of, _HEADERS, "reading headers")


def image_hashes(paths: list[str], cache: Path) -> pd.Series:
    """The perceptual hash of each image as UInt64, missing where it means nothing."""
    return _kept(paths, cache, Looks(), {"hash": pa.uint64()}, hashes_of, _PIXELS, "hashing images")["hash"]


def _kept(
    paths: list[str], cache: Path, looks: Looks, types: dict[str, pa.DataType], read: Reading, chunk: int, title: str
) -> pd.DataFrame:
    """The columns of ``types`` for every path: from ``cache`` where size and time are the same, else read and kept."""
    keys = _keys(paths, looks)
    known = _load(cache, [*keys.column_names, *types])
    rows = _rows_of(keys, known)
    if known is not None and len(rows) == len(known) and (rows == np.arange(len(rows))).all():
        return _as_pandas(known.select(list(types)), keys)
    new = np.flatnonzero(rows < 0)
    unread = keys.column("path").take(pa.array(new)).to_pylist()
    values = list(chain.from_iterable(_in_parallel(read, unread, chunk, title)))
    columns = zip(*values, strict=True) if values else [()] * len(types)
    fresh = pa.table({name: pa.array(list(column), kind) for (name, kind), column in zip(types.items(), columns, strict=True)})
    both = fresh if known is None else pa.concat_tables([known.select(list(types)), fresh])
    rows[new] = np.arange(len(new)) + (0 if known is None else len(known))
    facts = both.take(pa.array(rows))
    table = pa.table({name: part.column(name) for part in (keys, facts) for name in part.column_names})
    with whole(cache) as temporary:
        pq.write_table(table, temporary)
    return _as_pandas(facts, keys)


def _as_pandas(facts: pa.Table, keys: pa.Table) -> pd.DataFrame:
    return facts.append_column("identity", keys.column("identity")).to_pandas(types_mapper=pandas_type)


def _keys(paths: list[str], looks: Looks) -> pa.Table:
    """Path, size, time of change and identity of each file."""
    size, time, identity = looks.at([file_of(path) if "#" in path else path for path in paths]).T
    return pa.table({"path": pa.array(paths, pa.large_string()), "size": size, "time": time, "identity": identity})


def _load(cache: Path, columns: list[str]) -> pa.Table | None:
    """The kept facts; None where there are none, or of another version."""
    try:
        table = pq.read_table(cache)
    except (OSError, pa.ArrowException):
        return None
    return table if table.column_names == columns else None


def _rows_of(keys: pa.Table, known: pa.Table | None) -> np.ndarray:
    """For every key the row of ``known`` with the same path, size and time, else -1; what failed is read again."""
    if known is None:
        return np.full(len(keys), -1)
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


def _in_parallel(function: Callable, items: list[str], chunk: int, title: str) -> Iterator:
    """``function`` of chunks of ``items``, in order, in as many processes as there are cores."""
    parts = [items[i : i + chunk] for i in range(0, len(items), chunk)]
    results = processes().map(function, parts) if len(parts) > 1 else map(function, parts)
    yield from progress(results, title, total=len(parts))
