"""Running a trained model: one text, a dialogue, or many requests at once, with explicit state."""

from __future__ import annotations

from intarsia.inference.drafts import DraftModel, LookUp
from intarsia.inference.engine import Engine
from intarsia.inference.generate import generate, stream_text, text_pieces
from intarsia.inference.grammar import Grammars, Structure
from intarsia.inference.requests import Ended, Produced, Request
from intarsia.inference.sampling import GREEDY, Sampler, Sampling
from intarsia.inference.scheduler import Settings as EngineSettings

__all__ = [
    "GREEDY",
    "DraftModel",
    "Ended",
    "Engine",
    "EngineSettings",
    "Grammars",
    "LookUp",
    "Produced",
    "Request",
    "Sampler",
    "Sampling",
    "Structure",
    "generate",
    "stream_text",
    "text_pieces",
]
