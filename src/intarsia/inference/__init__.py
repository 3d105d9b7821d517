"""Running a trained model: prefill, then one token at a time with explicit state."""

from __future__ import annotations

from intarsia.inference.generate import generate, stream_text, text_pieces
from intarsia.inference.sampling import GREEDY, Sampler, Sampling

__all__ = ["GREEDY", "Sampler", "Sampling", "generate", "stream_text", "text_pieces"]
