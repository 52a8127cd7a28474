"""SST-Merge: put safety back into fine-tuned language models by merging LoRA adapters."""

__version__ = "0.1.0"
