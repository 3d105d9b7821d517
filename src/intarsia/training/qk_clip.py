"""QK-clip: attention logits are kept from growing without bound by rescaling the weights that make them.

Muon lets the largest query-key product of a head grow further than AdamW does. After a step in which a head's
largest logit went over the threshold, its query and key weights are scaled down so that the same input would
give the threshold exactly. The mixers say which rows of which weights (`ClipsLogits.logit_scales`); here is
when, and what it takes with several processes.

Source: Kimi Team 2025, "Kimi K2", arXiv:2507.20534, section 2.1 (MuonClip).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from intarsia.layers.qk_clip import ClipsLogits, RowScale
from intarsia.layers.side import SideResults
from intarsia.model import LanguageModel
from intarsia.model.block import Block
from intarsia.training.distributed import Processes


@torch.no_grad()
def clip_logits(
    model: LanguageModel, side: Sequence[SideResults], threshold: float, processes: Processes
) -> tuple[Tensor, Tensor] | None:
    """Rescale the heads whose logits went over `threshold`.

    Nothing here waits for the device: heads that did not are scaled by 1, which changes no bit.

    Args:
        side: of each layer, with the `largest_logits` of those that have them.

    Returns:
        The largest logit of all heads, and how many heads were rescaled, `[]` each; the same in every process. None
        for a model without such layers.
    """
    mixers = [cast(Block, block).mixer for block in model.blocks]
    seen = [
        (mixer, told.largest_logits)
        for mixer, told in zip(mixers, side, strict=True)
        if isinstance(mixer, ClipsLogits) and told.largest_logits is not None
    ]
    if not seen:
        return None
    # A process sees its own rows alone, and all must rescale alike.
    largest = processes.maximum(torch.cat([logits for _, logits in seen]))
    exceeded = largest > threshold
    factors = torch.where(exceeded, threshold / largest, 1.0)
    for (mixer, _), factor in zip(seen, factors.split([len(logits) for _, logits in seen]), strict=True):
        for scale in mixer.logit_scales(factor):
            scale_rows_(scale)
    return largest.max(), exceeded.sum()


@torch.no_grad()
def scale_rows_(scale: RowScale) -> None:
    """Multiply the rows of a parameter, also one that is divided among processes, each of which has some of them."""
    parameter, factor = scale.parameter, scale.factor
    if isinstance(parameter, DTensor):
        # Every process holds the same factors: no need to send process 0's.
        factor = distribute_tensor(
            factor.contiguous(), parameter.device_mesh, parameter.placements, src_data_rank=None
        ).to_local()
        parameter = parameter.to_local()
    factor = factor.view(-1, *[1] * (parameter.dim() - 1))
    if scale.zero == 0:
        parameter.mul_(factor)
    else:  # Rows that stay keep their bits, which adding and subtracting would round.
        parameter.copy_(torch.where(factor == 1, parameter, (parameter - scale.zero) * factor + scale.zero))
