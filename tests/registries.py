"""The classes that a registry finds: every merge method, every combination."""

import inspect


def concrete(kind):
    """Every class of this project below a class that can be made; not those that tests define."""
    found = [c for c in kind.__subclasses__() if c.__module__.startswith("src.") and not inspect.isabstract(c)]
    deeper = [d for c in kind.__subclasses__() for d in concrete(c)]
    return list(dict.fromkeys([*found, *deeper]))
