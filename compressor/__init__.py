"""Prune, heal, quantize and export transformer language models into deployable checkpoints."""

__version__ = "0.1.0"
