"""Safety and utility scores: pure functions on answers, and the torchmetrics that count them over processes."""
