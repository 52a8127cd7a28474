"""The chat template that lies beside an adapter: prompts go in by the base's, so one that differs is warned of."""

import logging
from pathlib import Path

from src.errors import InputError
from src.files import read_json

log = logging.getLogger(__name__)
TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"


def read_template(folder: Path) -> str | None:
    """The chat template beside an adapter, as transformers and TRL save it with the tokenizer; nothing without one.

    One that cannot be read is warned of: nothing but a warning hangs on it.
    """
    try:
        return _read(folder)
    except InputError as error:
        log.warning("%s", error)
        return None


def _read(folder: Path) -> str | None:
    if (folder / TEMPLATE).is_file():
        try:
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{folder / TEMPLATE}: not UTF-8 text ({error}); expected a chat template") from None
    if not (folder / TOKENIZER).is_file():
        return None
    settings = read_json(folder / TOKENIZER, "the settings of a tokenizer")
    found = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(found, list):  # several by name, as transformers wrote them before they had files of their own
        named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None
