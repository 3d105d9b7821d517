"""The engine behind the HTTP interface that people already use: OpenAI's, with streaming. Needs the extra `serve`."""

from __future__ import annotations

from intarsia.inference.server.served import Limits, Served

__all__ = ["Limits", "Served"]
