"""Ways to combine any number of experts into one update ΔW_u: one file per method."""
