"""Every judge, imported: ``--judge`` and suites choose from the subclasses of ``Judge``."""

from src.judges import causal, classifier, endpoint, refusal  # noqa: F401 - the subclasses of Judge are the registry
