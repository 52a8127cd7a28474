"""A row: one prompt, and for training and scoring its reference answer."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src.data.conversations import Message, spoken
from src.errors import InputError, one_line

NO_SPACE = re.compile(r"\S")


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        id: Identifier, unique within its source.
        prompt: What the user says.
        response: Reference answer; empty where a data set has prompts only.
        category: Kind of prompt, where known.
        source: Where the row was read.
        answer_tokens: Number of tokens of the answer that are learned or measured, from its first on; nothing is all.
        before: Roles and texts of the messages before the prompt: the system's, and earlier turns.
        goal: What a prompt in disguise is after, where the source names it: a judge is asked about that.
    """

    id: str
    prompt: str
    response: str = ""
    category: str = ""
    source: str = ""
    answer_tokens: int | None = None
    before: tuple[Message, ...] = ()
    goal: str = ""

    @property
    def asked(self) -> str:
        """The prompt, with the turns before it where there are some."""
        return spoken(self.before, self.prompt)

    @property
    def judged(self) -> str:
        """What a judge is asked about: the goal, else what is asked. A disguise speaks to the judge as to the model."""
        return self.goal or self.asked

    @property
    def prompt_hash(self) -> str:
        """:func:`text_hash` of what is asked."""
        return text_hash(self.asked)

    @property
    def goal_hash(self) -> str:
        """:func:`text_hash` of what a judge is asked about: a disguise and what it disguises have one."""
        return text_hash(self.judged)


def goal_of(record: Mapping[str, Any]) -> str:
    """:attr:`Row.goal_hash` of a stored row, of which the prompt and, in disguise, its goal are known."""
    if record.get("goal"):
        return text_hash(record["goal"])
    return str(record["prompt_hash"]) if "prompt_hash" in record else text_hash(record["prompt"])


def text_hash(text: str) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a text, case and white space folded."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()[:16]


def rows_sha256(rows: Iterable[Any]) -> str:
    """SHA-256 of rows (data classes), identifiers included, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        # Rows of whole answers to single prompts have the hash that they had before there were others.
        values = asdict(row)
        for key, usual in (("answer_tokens", None), ("before", ()), ("goal", "")):
            if values[key] == usual:
                del values[key]
        digest.update(json.dumps(values, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def learnt_sha256(rows: Iterable[Any]) -> str:
    """SHA-256 of prompts and answers, as far as they are learnt, in their order: not of identifiers and paths."""
    digest = hashlib.sha256()
    for row in rows:
        values = [row.prompt, row.response, row.answer_tokens, *([row.before] if row.before else [])]
        digest.update(json.dumps(values, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def copies(rows: Iterable[Any]) -> int:
    """Number of rows (data classes) that say what an earlier one says, whatever their identifiers and sources."""
    said = [{k: v for k, v in asdict(row).items() if k not in ("id", "source", "category")} for row in rows]
    return len(said) - len({json.dumps(values, sort_keys=True, default=str) for values in said})


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(place, object)`` for each line of a JSONL file; ``place`` is ``file:line`` for error messages.

    Raises:
        InputError: the file is missing or empty, or a line is not a JSON object.
    """
    lines = read_utf8(path).split("\n")
    if not any(line.strip() for line in lines):
        raise InputError(f"{path}: no rows; expected one JSON object per line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not valid JSON ({_reason(error)})") from None
        if "\\u" in line and not _is_text(value):
            raise InputError(f"{path}:{number}: half of a surrogate pair (\\ud800 to \\udfff alone) is no text")
        if not isinstance(value, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, found {type(value).__name__}")
        yield f"{path}:{number}", value


def read_json(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON file: those of its one list, one per line, or one behind the other over several lines.

    As ``datasets`` has it, a key that an object lacks and another has is null, and a list of texts is a column
    ``text``. Values stay as they stand there, where Arrow makes times of texts that look like one.

    Raises:
        InputError: the file is none of these.
    """
    text = read_utf8(path).rstrip()
    rows = _entries(path, text)
    if rows and all(isinstance(row, str) for row in rows):
        rows = [{"text": row} for row in rows]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: entry {number} is a {type(row).__name__}; expected a JSON object")
        if "\\u" in text and not _is_text(row):
            raise InputError(f"{path}: entry {number}: half of a surrogate pair (\\ud800 to \\udfff alone) is no text")
    nulls = dict.fromkeys(key for row in rows for key in row)
    return [nulls | row for row in rows]


def _entries(path: Path, text: str) -> list[Any]:
    first = text.lstrip().partition("\n")[0]
    try:
        if first.startswith("["):
            entries: list[Any] = json.loads(text)
            return entries
        if first.startswith("{") and not _is_json(first):
            return list(_walk(text))
    except (ValueError, RecursionError) as error:
        place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise InputError(f"{place}: not valid JSON ({_reason(error)})") from None
    return [value for _, value in read_jsonl(path)]


def _reason(error: ValueError | RecursionError) -> str:
    """What Python's decoder refuses: a syntax at a column, or a number too long or brackets too deep for it."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else one_line(error)


def _walk(text: str) -> Iterator[Any]:
    """The JSON values that stand one behind the other in a text."""
    decoder, end = json.JSONDecoder(), 0
    while start := NO_SPACE.search(text, end):
        value, end = decoder.raw_decode(text, start.start())
        yield value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def read_utf8(path: Path) -> str:
    """The text of a file of rows.

    Raises:
        InputError: there is none, or it is not UTF-8.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        # What Windows writes begins with a mark, and ends lines in two.
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({one_line(error)})") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a JSONL file of rows") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a directory; expected a JSONL file of rows") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _is_text(value: Any) -> bool:
    """Whether what a line holds can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
