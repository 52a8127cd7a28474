"""Categories of rows. A row may have several (BeaverTails flags fourteen harms): it is counted under each of them."""

from collections.abc import Iterable, Sequence
from typing import Any

APART = " + "
"""Between the categories of a row, in text; the names of hub data sets have commas of their own."""
NO_CATEGORY = "none"
"""Where rows without a category are counted, if others have one."""


def category_text(value: Any) -> str:
    """A row's categories as one text: of a list its entries, of a mapping of flags the names of the true ones."""
    if isinstance(value, dict):
        value = [name for name, on in value.items() if on]
    if isinstance(value, list):
        return APART.join(text for each in value if (text := category_text(each)))
    return "" if value is None else str(value).strip()


def categories_of(category: str) -> list[str]:
    """The categories that a text names, each once."""
    return list(dict.fromkeys(category.split(APART)))


def named_categories(categories: Sequence[str]) -> list[str]:
    """The category of each row, :data:`NO_CATEGORY` where it has none; nothing where no row has one."""
    return [category or NO_CATEGORY for category in categories] if any(categories) else []


def each_category(categories: Iterable[str]) -> list[str]:
    """Every single category that rows have, sorted."""
    return sorted({name for category in categories for name in categories_of(category)})
