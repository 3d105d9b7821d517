"""Caches of transformers with room for tokens to come.

A `DynamicCache` copies all keys and values for every token that it appends: behind a long text that is more bytes than
the weights. Its layers are given room here, into which tokens are written; what they return is the part that is filled.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST, SHARE = 64, 4
"""Room is made for this many tokens, or for one to so many that are there, whichever is more."""


def with_room(cache: Any) -> Any:
    """The cache itself, whose layers of ordinary attention append in place from now on; layers of windows, linear ones,
    those of static or offloaded caches and others stay what they are.

    What a layer has returned stays what it is, and so do copies of it: the first that appends writes into the room that
    they share, the others copy.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(cache) is DynamicCache and not cache.offloading:
        roomy = _layer_class(DynamicLayer)
        for layer in cache.layers:
            if type(layer) is DynamicLayer:
                layer.__class__ = roomy
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = roomy
    return cache


@dataclass
class _Room:
    """Keys or values `[B, heads, room, dim]`, of which the first `written` tokens are there."""

    content: Tensor
    written: int

    @classmethod
    def around(cls, held: Tensor, more: int) -> _Room:
        """Room that holds what there is, for `more` tokens and some to come."""
        n = held.shape[2]
        room = held.new_empty(*held.shape[:2], n + max(more, LEAST, n // SHARE), held.shape[3])
        room[:, :, :n] = held
        return cls(room, n)

    def fits(self, held: Tensor, new: Tensor) -> bool:
        """Whether new tokens can be written behind what is held, which must be all that is written here."""
        n = held.shape[2]
        return (
            self.written == n
            and n + new.shape[2] <= self.content.shape[2]
            and held.data_ptr() == self.content.data_ptr()
            and held.shape[:2] == self.content.shape[:2]
            and (torch.is_inference_mode_enabled() or not self.content.is_inference())
        )

    def append(self, new: Tensor) -> Tensor:
        """All that is there with the new tokens, a view."""
        end = self.written + new.shape[2]
        self.content[:, :, self.written : end] = new
        self.written = end
        return self.content[:, :, :end]


@functools.lru_cache
def _layer_class(of: Any) -> Any:
    """The layer of a cache that has room."""

    class RoomyLayer(of):
        rooms: dict[str, _Room]

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
        ) -> tuple[Tensor, Tensor]:
            recorded = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
            if recorded or torch.compiler.is_compiling():
                found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **options)
                return found
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys = self._appended("keys", key_states)
            self.values = self._appended("values", value_states)
            return self.keys, self.values

        def _appended(self, name: str, new: Tensor) -> Tensor:
            held = getattr(self, name)
            if held.dim() != 4:  # nothing yet
                held = new[:, :, :0]
            rooms = self.__dict__.setdefault("rooms", {})
            if name not in rooms or not rooms[name].fits(held, new):
                # A dictionary of its own: a copy of the layer has the old one.
                rooms = self.rooms = {**rooms, name: _Room.around(held, new.shape[2])}
            return rooms[name].append(new)

    return RoomyLayer
