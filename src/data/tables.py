"""JSON files, and files and hub data sets that ``datasets`` reads."""

import glob
from collections.abc import Collection
from pathlib import Path
from typing import Any

from src.data.hub_sets import load_hub_set
from src.data.rows import read_json
from src.errors import InputError, one_line

FILE_READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json"}


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
    if reader is not None and not path.is_file():
        raise InputError(f"{path}: no such file; expected {reader} rows")
    if reader == "json":
        return read_json(path)
    # What ``datasets`` looks below is a pattern to it that cannot be escaped: ``run[1]`` is ``run1``.
    if path.is_dir() and (place := str(path.resolve())) != glob.escape(place):
        raise InputError(f"{name}: the path {place} has one of * ? [; expected another name, or the files one by one")
    import datasets

    from src.hub import UNREACHABLE

    try:
        if reader is not None:
            extra: dict[str, Any] = {"sep": "\t"} if path.suffix == ".tsv" else {}
            if reader == "csv":
                extra |= {"converters": dict.fromkeys(text, str), "keep_default_na": False, "na_values": [""]}
            # Whole, since the working directory would be a part of the pattern, too.
            files = glob.escape(str(path.parent.resolve() / path.name))
            return datasets.load_dataset(reader, data_files=files, split="train", **extra)
        if path.is_dir():
            return datasets.load_dataset(str(path), subset, split=split)
        return load_hub_set(name, subset=subset, split=split, revision=revision)
    except InputError:
        raise
    # A RuntimeError is what a data set that is a script ends in.
    except (*UNREACHABLE, datasets.exceptions.DatasetsError) as error:
        # What went wrong while a file was read is behind a sentence that says nothing.
        reason = one_line(error.__cause__ or error)
        raise InputError(f"{name}: neither a readable file nor a data set that can be fetched now ({reason})") from None
