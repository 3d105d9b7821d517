"""Intarsia builds, judges and runs hybrid linear-attention language models."""

__version__ = "0.1.0"
