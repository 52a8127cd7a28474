"""JSON files, and files and hub data sets that ``datasets`` reads."""

import csv
import glob
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from src.data.hub_sets import load_hub_set
from src.data.rows import read_json
from src.errors import InputError, one_line

FILE_READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json"}
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def load_table(
    name: str, path: Path, *, subset: str | None, split: str, revision: str | None, text: Collection[str]
) -> Any:
    """A table of rows that are mappings from columns to values.

    Args:
        name: A file's or a directory's path, or a hub data set's name.
        path: The same, where it has been found.
        subset: The hub data set's configuration name.
        split: The hub data set's split.
        revision: The hub data set's git revision.
        text: Columns of a CSV file that are text as it stands: ``0.10`` is no number there, ``None`` no missing value.

    Raises:
        InputError: there is no such file, or nothing that ``datasets`` can read or fetch, or a directory's path has
            one of ``* ? [``.
    """
    reader = FILE_READERS.get(path.suffix)
    _check_name(path, reader)
    if reader == "json":
        return read_json(path)
    files = [path] if reader == "csv" else _tables_below(path) if path.is_dir() else []
    for file in files:
        _check_fields(file)
    # What ``datasets`` looks below is a pattern to it that cannot be escaped: ``run[1]`` is ``run1``.
    if path.is_dir() and (place := str(path.resolve())) != glob.escape(place):
        raise InputError(f"{name}: the path {place} has one of * ? [; expected another name, or the files one by one")
    import datasets

    from src.hub import UNREACHABLE

    try:
        if reader is not None:
            extra = _as_text(text) | {"sep": SEPARATORS[path.suffix]} if reader == "csv" else {}
            # Whole, since the working directory would be a part of the pattern, too.
            whole = glob.escape(str(path.parent.resolve() / path.name))
            return datasets.load_dataset(reader, data_files=whole, split="train", **extra)
        if path.is_dir():
            extra = _as_text(text) if files else {}
            return datasets.load_dataset(str(path), subset, split=split, **extra)
        return load_hub_set(name, subset=subset, split=split, revision=revision)
    except InputError:
        raise
    # A RuntimeError is what a data set that is a script ends in.
    except (*UNREACHABLE, datasets.exceptions.DatasetsError) as error:
        # What went wrong while a file was read is behind a sentence that says nothing.
        reason = one_line(error.__cause__ or error)
        raise InputError(f"{name}: neither a readable file nor a data set that can be fetched now ({reason})") from None


def _check_name(path: Path, reader: str | None) -> None:
    if reader is not None and not path.is_file():
        raise InputError(f"{path}: no such file; expected {reader} rows")
    if reader is None and path.is_file():
        read = ", ".join([".jsonl", ".jsonl.gz", *FILE_READERS])
        raise InputError(f"{path}: the name ends in {path.suffix or 'nothing'!r}; expected one of {read}")


def _as_text(columns: Collection[str]) -> dict[str, Any]:
    """How pandas reads a CSV file whose texts stay as they are."""
    return {"converters": dict.fromkeys(columns, str), "keep_default_na": False, "na_values": [""]}


def _tables_below(path: Path) -> list[Path]:
    """The CSV files of a directory, where they are all of its data.

    Raises:
        InputError: one has tabs, which would be read as text.
    """
    seen = [file for file in sorted(path.rglob("*.*")) if not _is_hidden(file.relative_to(path))]
    data = [file for file in seen if file.suffix in {".jsonl", *FILE_READERS} and file.name != "dataset_infos.json"]
    if tabs := [file for file in data if file.suffix == ".tsv"]:
        raise InputError(f"{tabs[0]}: tables with tabs in a directory are not read; name the files one by one")
    return data if all(file.suffix == ".csv" for file in data) else []


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _check_fields(path: Path) -> None:
    """Check that a CSV file has rows, and none with more fields than its header.

    pandas takes the first field of such rows for the row's name, and moves the others to the left.

    Raises:
        InputError: it has none, or one has.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            rows = csv.reader(handle, delimiter=SEPARATORS[path.suffix])
            header, any_row = next((row for row in rows if "".join(row).strip()), []), False
            if len(header) == 1 and (other := next((mark for mark in ";\t" if mark in header[0]), None)):
                raise InputError(
                    f"{path}: one column, {header[0]!r}; expected {SEPARATORS[path.suffix]!r} between columns, not "
                    f"{other!r} (a file whose columns have tabs between them is named .tsv)"
                )
            for row in rows:
                any_row |= bool(row)
                if len(row) > len(header):
                    raise InputError(
                        f"{path}, line {rows.line_num}: {len(row)} fields under a header of {len(header)}; expected "
                        "quotes around text that holds the separator, and a name for each column"
                    )
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    except csv.Error:
        return  # for pandas to say
    if not any_row:
        raise InputError(f"{path}: no rows")
