"""What settings mean, apart from where files lie: rows by the hash of their file, a local base by that of its files."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from src.adapters.given_adapter import files_of
from src.data.row_source import RowSource, as_sources, find_file, mapped_source
from src.data.tables import FILE_READERS
from src.errors import InputError
from src.experiments.plain_settings import plain
from src.files import sha256_file
from src.own_classes import with_sources

ROWS = {"fit": ("train", "val"), "fisher": ("safety", "utility"), "given": (), "test": (), "merge": (), "inspect": ()}
"""Keys of ``data`` that name rows."""
SUITE_ROWS = ("rows", "few_shot")
MODELS = ("aligned", "base", "name")
"""Options of a method or a judge that name a model."""
ADAPTERS = ("reference_safety", "reference_utility", "beside")
"""Options of ``fit`` and ``fisher`` that weigh adapters by name."""
ROLES = ("base", "utility", "safety", "patched")
"""Names there that are no paths."""
RUNNING = frozenset(("batch_size", "retries", "wait", "timeout", "parallel", "key_variable"))
"""Options of judges that say how one is run: no verdict follows from them, so they mean nothing here."""


def identified(stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with files replaced by their content, and classes of a user's own beside that of their source.

    Raises:
        InputError: a file of rows is missing, or a class has no file.
    """
    found = dict(settings)
    if stage == "given":
        found["adapter"] = adapter_content(found["adapter"])
    if "data" in found:
        data = dict(found["data"])
        for key in ROWS[stage]:
            if data.get(key) is not None:
                data[key] = [source_content(source) for source in sources(data[key])]
        if "suites" in data:
            data["suites"] = [_suite_content(suite) for suite in data["suites"]]
        found["data"] = data
    if "model" in found:
        found["model"] = _model_content(found["model"])
    if isinstance(found.get("method"), Mapping):
        found["method"] = _object_content(found["method"])
    if "combine" in found:
        found["combine"] = with_sources(found["combine"])
    return found


def _model_content(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's settings, local bases and adapters by their files' content."""
    found = dict(model)
    if "regularizer" in found:
        found["regularizer"] = with_sources(found["regularizer"])
    if found.get("base") is not None:
        found["base"] = found["base"] | {"name": base_content(str(found["base"]["name"]))}
    for key in ADAPTERS:
        if isinstance(found.get(key), Mapping):
            found[key] = {n if n in ROLES else base_content(n): weight for n, weight in found[key].items()}
    return found


def _suite_content(suite: Mapping[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {
        key: [source_content(s) for s in sources(suite[key])] for key in SUITE_ROWS if suite.get(key) is not None
    }
    if any("goal" in source["columns"] for source in rows.get("rows", ()) if "columns" in source):
        # Before, rows were known by their prompts; cells of then are others.
        rows["known_by"] = "goal"
    judge = suite.get("judge")
    if not isinstance(judge, Mapping):
        return dict(suite) | rows
    # Before, refusals were the list's whoever judged them; cells of then are others.
    counts = {"counts": "refused"} if _finds_refusal(judge) else {}
    return dict(suite) | rows | {"judge": _object_content(judge) | counts}


def _finds_refusal(judge: Mapping[str, Any]) -> bool:
    name = str(judge.get("class_path", "")).rpartition(".")[2]
    return name == "Refusal" or (judge.get("init_args") or {}).get("finds") == "refusal"


def _object_content(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """A method or a judge without how it is run, its local models replaced by their files' content."""
    found = with_sources(chosen)
    # What options of these names mean to a user's own class is not known.
    apart = frozenset[str]() if "source" in found else RUNNING
    given = {key: value for key, value in (found.pop("init_args", None) or {}).items() if key not in apart}
    given |= {key: base_content(given[key]) for key in MODELS if isinstance(given.get(key), str)}
    return found | ({"init_args": given} if given else {})


def sources(value: Any) -> list[RowSource]:
    """Row sources as they come from a flag, YAML or Python.

    Raises:
        InputError: a mapping has a key that no source has, a value of another kind, or no path.
    """
    items = value if isinstance(value, list) else [value]
    found: list[RowSource] = []
    for item in items:
        found += as_sources(mapped_source(item, "rows") if isinstance(item, Mapping) else item)
    return found


def source_content(source: RowSource) -> dict[str, Any]:
    """A source with its file replaced by a hash; a hub data set stays its name and revision."""
    path = find_file(source.path)
    looks_local = source.path.startswith((".", "/")) or Path(source.path).suffix in (".jsonl", *FILE_READERS)
    if path is None and looks_local:
        raise InputError(f"{source.path}: no such file; expected rows")
    found: dict[str, Any] = plain(source)
    return found if path is None else found | {"path": _hash(path.resolve())}


def base_content(name: str) -> str:
    """A local model by its files; a hub id or a packaged model by its name."""
    path = Path(name)
    return _hash(path.resolve()) if path.exists() else name


def adapter_content(name: str) -> str:
    """An adapter's directory by the files that make it one; a hub repository by its name.

    Raises:
        InputError: there is no such directory, and no repository has such a name.
    """
    files = files_of(name)
    return _hash_all(Path(name), files) if files else name


def _hash(path: Path) -> str:
    return _hash_all(path, sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path])


def _hash_all(root: Path, files: Sequence[Path]) -> str:
    return _hash_files(str(root), tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in files))


@lru_cache(maxsize=4096)
def _hash_files(root: str, state: tuple[tuple[str, int, int], ...]) -> str:
    """Hash of files, each read once as long as size and time of change stay."""
    digest = hashlib.sha256()
    for name, _, _ in state:
        content = sha256_file(Path(name))
        digest.update(f"{Path(name).relative_to(root) if name != root else ''} {content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def count_rows(value: Any) -> int | None:
    """Number of rows of sources in JSONL files; unknown where one is no such file, or only some of its rows count."""
    total = 0
    for source in sources(value):
        path = find_file(source.path)
        if path is None or path.suffix != ".jsonl" or source.where or source.unique or source.answered:
            return None
        with path.open("rb") as handle:
            count = max(0, sum(1 for line in handle if line.strip()) - source.skip)
        total += count if source.limit is None else min(count, source.limit)
    return total


def plain_sources(value: Any) -> list[dict[str, Any]]:
    """Sources as plain mappings."""
    return [plain(source) for source in sources(value)]


def redrawn(value: Any, seed: int, taken: Collection[str]) -> list[dict[str, Any]]:
    """Sources, of which those that are a draw from a file of their own are another draw for each seed.

    A draw has a seed, a limit and no skip: a source with a skip is a part of a file. A file that experts are trained on
    is divided by seed, skip and limit: there another shuffle would mix the parts.

    Args:
        value: The sources.
        seed: The study's seed.
        taken: Files that experts are trained on (:func:`place`).
    """
    return [plain(_shuffled_anew(s, seed) if _is_draw(s) and place(s) not in taken else s) for s in sources(value)]


def place(source: RowSource) -> str:
    """Where a source's rows are, however its path is spelled; a hub data set is its name."""
    path = find_file(source.path)
    return source.path if path is None else str(path.resolve())


def all_redrawn(value: Any, seed: int) -> list[dict[str, Any]]:
    """Sources, of which all that have a seed are shuffled by another one: parts of one shuffled file stay apart."""
    return [plain(s if s.seed is None else _shuffled_anew(s, seed)) for s in sources(value)]


def _shuffled_anew(source: RowSource, seed: int) -> RowSource:
    return replace(source, seed=(source.seed or 0) + seed)


def _is_draw(source: RowSource) -> bool:
    return source.seed is not None and source.limit is not None and source.skip == 0
