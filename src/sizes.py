"""Sizes for people."""


def human_size(size: float) -> str:
    """Bytes in a few digits, by powers of 1 000."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
