"""Reading CSV tables as text, in the variants that programs write."""

from __future__ import annotations

import codecs
import csv
import io
import re
from pathlib import Path

import pandas as pd

from forensics_lib.data.rows import LayoutError, contents
from forensics_lib.utils.files import LFS, LFS_POINTER, broken_link


def read_listing(path: Path, columns: list[str]) -> pd.DataFrame:
    """Read the CSV of a data set as text.  Raises ``LayoutError`` if it is missing or has other columns."""
    if not path.is_file():
        raise LayoutError(f"no {path.name} in {path.parent}; {contents(path.parent)}")
    listing = read_text_table(path)
    if list(listing.columns) != columns:
        raise LayoutError(f"{path} has the columns {list(listing.columns)}; expected {columns}")
    return listing


def read_text_table(path: Path, rows: int | None = None) -> pd.DataFrame:
    """Read a CSV, or its first ``rows`` rows, as text: column names in lower case, the index counts lines from 1.

    Fields may be separated by commas, semicolons or tabs, and quoted; blanks around them and empty lines are ignored, and
    short rows are filled with empty fields.  A first line ``sep=;``, as in Excel, sets the separator.  Raises
    ``LayoutError``.
    """
    text = read_text(path)
    lines = text.lstrip("\r\n")
    stated = _SEPARATOR.match(lines)
    lines = lines[stated.end() :] if stated else lines
    try:
        table = pd.read_csv(
            io.StringIO(lines),
            sep=stated[1] if stated else _delimiter(lines),
            header=None,
            dtype=str,
            nrows=None if rows is None else rows + 1,
            skipinitialspace=True,
            skip_blank_lines=False,
            keep_default_na=False,
        )
    except (ValueError, csv.Error) as error:  # pandas raises ValueErrors for damaged files
        raise LayoutError(f"{path} is not a CSV: {str(error).strip()}. A field that holds a separator must be quoted") from None
    table = table.fillna("").apply(lambda column: column.str.strip())
    table.index += 1 + _line_ends(text[: len(text) - len(lines)])
    table = table[table.ne("").any(axis=1)]
    return _with_header(path, table)


_SEPARATOR = re.compile(r"\"?sep=([^\r\n])\"?[,;\t ]*(?:[\r\n]+|$)", re.IGNORECASE)


def _delimiter(text: str) -> str:
    """The separator of a table's fields, by its header."""
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    return max(",;\t", key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), [])))


def _with_header(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table with its first row as column names, without empty columns."""
    if table.empty:
        raise LayoutError(f"{path} is not a CSV: it is empty")
    table = table.loc[:, table.ne("").any()]
    names, body = table.iloc[0].str.lower().tolist(), table.iloc[1:]
    if "" in names:
        raise LayoutError(
            f"{path}: column {names.index('') + 1} has no name. If it is the index that pandas writes, write the table again "
            "with to_csv(..., index=False); else name it, or take it out"
        )
    if len(set(names)) < len(names):
        raise LayoutError(f"{path} names a column twice: {', '.join(names)}")
    return body.set_axis(names, axis=1)


def read_text(path: Path) -> str:
    """Read a text file: UTF-8 with or without a byte order mark, or UTF-16 with one.  Raises ``LayoutError``."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LayoutError(f"{path} cannot be read: {broken_link(path) or error.strerror}") from None
    if data.startswith(LFS):
        raise LayoutError(f"{path} is {LFS_POINTER}")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        row, kind = _line_ends(data[: error.start].decode("latin-1")) + 1, "CSV" if path.suffix.lower() == ".csv" else "text"
        raise LayoutError(
            f"{path} is not a {kind} in UTF-{16 if wide else 8}: byte 0x{data[error.start]:02x} in row {row}. Save it as UTF-8 "
            f"(Excel: CSV UTF-8), or convert it from its own encoding: iconv -f cp1252 -t UTF-8 {path.name} > new{path.suffix}"
        ) from None
    if "\0" in text:
        row = _line_ends(text[: text.index("\0")]) + 1
        raise LayoutError(f"{path} row {row}: holds a null byte, which no text does (UTF-16 needs a byte order mark)")
    return text


def _line_ends(text: str) -> int:
    return len(re.findall(r"\r\n|\r|\n", text))
