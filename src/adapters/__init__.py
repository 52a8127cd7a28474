"""PEFT adapter directories and low-rank pairs, their algebra, and the bases they span."""
