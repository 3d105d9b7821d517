"""Modules that have values from the beginning, as PyTorch's own have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

GeneratorOf = Callable[[str], torch.Generator | None]
"""The generator to draw a module's parameter of that name with; None is PyTorch's global one."""

INITIAL_STD = 0.02
"""The standard deviation of what is drawn normally where no model says another."""


class FillsItself(nn.Module):
    """A module that says what the parameters and buffers that belong to it directly begin with.

    A subclass fills them in `init_own_weights` and `init_own_buffers`, and calls `reset_parameters` at the end of its
    `__init__`. So it can be used as it was made, on its own or in any PyTorch model; on the meta device that costs
    nothing. `intarsia.model.init_weights` fills a whole model by a seed instead.

    Buffers that are in no state dictionary are filled again when the module leaves the meta device (`to_empty`), and
    when weights are loaded into it there (`load_state_dict(..., assign=True)`).
    """

    drawn_as_parent: ClassVar[bool] = False
    """Whether a model's seed draws its parameters under the name of the module that holds it, as if they were that
    one's own."""

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        """Fill the parameters that belong to the module directly, `generator_of(name)` being the generator for the
        parameter `name`, and `std` the model's standard deviation of matrices. Called without gradients."""

    def init_own_buffers(self) -> None:
        """Fill the buffers that belong to the module directly. Called without gradients."""

    def reset_parameters(self) -> None:
        """Fill what belongs to the module directly as when it was made, from PyTorch's global generator."""
        own = [*self._parameters.values(), *self._buffers.values()]
        if all(tensor is None or tensor.is_meta for tensor in own):
            return
        with torch.no_grad():
            self.init_own_weights(lambda _: None, INITIAL_STD)
            self.init_own_buffers()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        meta = self._unsaved_on_meta()
        result = super()._apply(fn, recurse)
        if meta and not self._unsaved_on_meta():
            self._fill_unsaved()
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        unsaved, metadata = self._unsaved_on_meta(), args[0] if args else kwargs["local_metadata"]
        if not unsaved or not metadata.get("assign_to_params_buffers", False):
            return
        device = next((t.device for key, t in state_dict.items() if key.startswith(prefix)), None)
        if device is None or device.type == "meta":
            return
        for name in unsaved:
            self._buffers[name] = torch.empty_like(getattr(self, name), device=device)
        self._fill_unsaved()

    def _unsaved_on_meta(self) -> list[str]:
        """The names of own buffers that are in no state dictionary and have no memory."""
        unsaved = self._non_persistent_buffers_set
        return [name for name, b in self._buffers.items() if b is not None and b.is_meta and name in unsaved]

    def _fill_unsaved(self) -> None:
        """Fill the buffers that are in no state dictionary, and leave the others as they are."""
        unsaved = self._non_persistent_buffers_set
        saved = {n: b.clone() for n, b in self._buffers.items() if b is not None and n not in unsaved}
        with torch.no_grad():
            self.init_own_buffers()
            for name, content in saved.items():
                self._buffers[name].copy_(content)  # type: ignore[union-attr]
