"""QK-clip: attention logits are kept from growing without bound by rescaling the weights that make them.

Muon lets the largest query-key product of a head grow further than AdamW does. After a step in which a head's
largest logit went over the threshold, its query and key weights are scaled down so that the same input would
give the threshold exactly. The mixers know how (`qk_clip_`); here is when, and what it takes with several
processes.

Source: Kimi Team 2025, "Kimi K2", arXiv:2507.20534, section 2.1 (MuonClip).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from intarsia.training.distributed import Processes


def watch_logits(model: nn.Module) -> list[nn.Module]:
    """Make every softmax mixer record its largest logits, and return these mixers. May be none."""
    mixers = [module for module in model.modules() if hasattr(module, "qk_clip_")]
    for mixer in mixers:
        mixer.record_max_logit = True  # type: ignore[assignment]
    return mixers


@torch.no_grad()
def clip_logits(mixers: list[nn.Module], threshold: float, processes: Processes) -> tuple[float, int]:
    """Rescale the heads whose logits went over `threshold` since the last call.

    Returns:
        The largest logit of all heads, and how many heads were rescaled; the same in every process.
    """
    if not mixers:
        return float("-inf"), 0
    recorded: list[Tensor] = [mixer.max_logit for mixer in mixers]  # type: ignore[misc]
    # A process sees its own rows alone, and all must rescale alike.
    largest = processes.maximum(torch.cat([values.reshape(-1) for values in recorded]))
    for values, agreed in zip(recorded, largest.split([values.numel() for values in recorded]), strict=True):
        values.copy_(agreed.view_as(values))
    clipped = 0
    for mixer, values in zip(mixers, recorded, strict=True):
        if bool((values > threshold).any()):
            with _whole_parameters(mixer):
                clipped += mixer.qk_clip_(threshold)  # type: ignore[operator]
        else:
            values.fill_(float("-inf"))
    return float(largest.max()), clipped


@contextmanager
def _whole_parameters(module: nn.Module) -> Iterator[None]:
    """Replace divided parameters by whole ones, and divide what they have become at the end.

    Heads do not end where shards do, and an operation in place cannot mix plain tensors with DTensors.
    """
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for owner, name, parameter in places:
        owner._parameters[name] = nn.Parameter(parameter.full_tensor(), requires_grad=False)
    try:
        yield
    finally:
        for owner, name, parameter in places:
            whole = owner._parameters[name]
            assert whole is not None
            # Every process holds the same whole tensor: no need to send process 0's.
            part = distribute_tensor(
                whole.data, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter.to_local().copy_(part.to_local())
            owner._parameters[name] = parameter
