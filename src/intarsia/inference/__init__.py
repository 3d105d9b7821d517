"""Running a trained model: prefill, then one token at a time with explicit state."""

from __future__ import annotations

from intarsia.inference.generate import decode, generate, stream_text
from intarsia.inference.sampling import GREEDY, Sampler, Sampling

__all__ = ["GREEDY", "Sampler", "Sampling", "decode", "generate", "stream_text"]
