"""Per-example scores and Fisher information in core coordinates."""
