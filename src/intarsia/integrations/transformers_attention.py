"""Softmax attention of Intarsia under a name in transformers: `attn_implementation="intarsia"`.

transformers asks two functions for each name: one makes the mask of a forward pass, the other attends. Here the mask
is a description (`CausalMask`): causal, with a window, with padding. Attention that gets the description hands queries,
keys and values to `softmax_attention` where they lie, and nothing of size queries times keys is made; any other code
that looks into it finds the mask that it describes. What cannot be described is a mask as for PyTorch's own attention,
and goes to that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from intarsia.errors import UnsupportedError
from intarsia.extras import require
from intarsia.ops import Sequences, softmax_attention
from intarsia.ops.tracing import observed, transform

NAME = "intarsia"
"""What models call it by."""

UNKNOWN = ("softcap", "sinks")
"""Arguments of attention in some families that change what is computed, and that neither this nor PyTorch's has."""

WHOLE = 16
"""Padded sequences of more tokens with nothing before them are computed one by one: PyTorch has kernels for that."""


def register_attention() -> None:
    """Let transformers know the name. It changes no model that does not ask for it, and stays.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    require("transformers", "hf")
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


@dataclass(frozen=True)
class Rows:
    """Where the tokens of each padded sequence are: those that are not padding stand in one run."""

    keys: tuple[tuple[int, int], ...]
    """The first and the end of each sequence's run among the keys."""
    queries: tuple[tuple[int, int], ...]
    """The same among the queries; empty where they are all padding."""


class CausalMask(torch.Tensor):
    """A mask `[B, 1, T, S]`, bool, that says which keys each query sees: the T queries are the last of the S tokens, a
    query sees the tokens up to its own, of them the last `window`, and of those what is not padding.

    It takes no memory. Every operation of PyTorch on it computes with the mask itself.
    """

    window: int | None
    padding: Tensor | None
    """`[B, S]` bool, False where padding is; None where there is none."""

    @staticmethod
    def __new__(
        cls,
        batch: int,
        queries: int,
        keys: int,
        window: int | None,
        padding: Tensor | None,
        device: torch.device | str,
    ) -> CausalMask:
        made: CausalMask = torch.Tensor._make_wrapper_subclass(
            cls, (batch, 1, queries, keys), dtype=torch.bool, device=torch.device(device)
        )
        made.window, made.padding = window, padding
        return made

    def __init__(self, *arguments: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, CausalMask.made, (args, kwargs or {}))
        return function(*args, **kwargs)

    def made(self) -> Tensor:
        """The mask itself."""
        B, _, T, S = self.shape
        seen = torch.ones(T, S, dtype=torch.bool, device=self.device).tril(S - T)
        if self.window is not None:
            seen = seen.triu(S - T - self.window + 1)
        shown = seen.expand(B, 1, T, S)
        return shown if self.padding is None else shown & self.padding[:, None, None, :]

    @functools.cached_property
    def rows(self) -> Rows | None:
        """Where the tokens are, or None where a sequence has padding between its tokens."""
        assert self.padding is not None
        (T, S), there = self.shape[2:], self.padding.int()
        counts, first = there.sum(1), there.argmax(1)
        ends = S - there.flip(1).argmax(1)
        runs = torch.stack([first, torch.where(counts > 0, ends, first), counts]).tolist()
        if any(end - begin != count for begin, end, count in zip(*runs, strict=True)):
            return None
        keys = tuple(zip(runs[0], runs[1], strict=True))
        past = S - T
        queries = tuple((max(begin - past, 0), max(end - past, 0)) for begin, end in keys)
        return Rows(keys, tuple((begin, max(begin, end)) for begin, end in queries))


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """The mask of a forward pass, as transformers asks for it: a `CausalMask`, or one as for PyTorch's attention where
    the pattern is another, the cache is static, or a graph is traced."""
    from transformers import masking_utils

    function = masking_utils.causal_mask_function if mask_function is None else mask_function
    plain, window = _pattern(function, local_size)
    # A static cache has room for keys that are not there yet.
    ends = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    if not plain or not ends or observed() or options.get("use_vmap"):
        if isinstance(q_offset, Tensor):
            # PyTorch's attention would take a static cache that is empty without one, but ours may have sinks.
            options["allow_is_causal_skip"] = False
        made: Tensor | None = masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, function, attention_mask, local_size,
            device=device, **options,
        )  # fmt: skip
        return made
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
        padding = None if bool(padding.all()) else padding
    if window is not None and window >= kv_length:
        window = None
    return CausalMask(batch_size, q_length, kv_length, window, padding, device)


def _pattern(function: Callable[..., Any], local_size: int | None) -> tuple[bool, int | None]:
    """Whether a mask function of transformers is causal and nothing else, but for a window; and the window."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return True, None
    # What `sliding_window_causal_mask_function` returns: the conjunction of a window's function and the causal one.
    made_by = _made_by(function)
    if local_size is None or made_by[0] != "and_masks":
        return False, None
    parts = made_by[1].get("mask_functions", ())
    if len(parts) != 2 or parts[1] is not masking_utils.causal_mask_function:
        return False, None
    name, values = _made_by(parts[0])
    window = values.get("sliding_window")
    return name == "sliding_window_overlay" and window == local_size, window


def _made_by(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """The function of `masking_utils` that made this one, and what this one keeps of it."""
    code = getattr(function, "__code__", None)
    if code is None or getattr(function, "__module__", None) != "transformers.masking_utils":
        return "", {}
    cells = function.__closure__ or ()
    kept = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    return function.__qualname__.partition(".")[0], kept


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query, key, value: `[B, H, T, K]`, `[B, HKV, S, K]`, `[B, HKV, S, V]`.
        attention_mask: of `mask`, or made by the model: bool, True where a query sees a key, or added to the logits.
        s_aux: the sinks `[H]` of families that have them.

    Returns:
        `[B, T, H, V]`, and None in the place of the weights. What padding asks is answered with zeros.

    Raises:
        UnsupportedError: an argument that changes what is computed, and is not known here.
    """
    for name in UNKNOWN:
        if options.get(name) is not None:
            raise UnsupportedError(
                f'{type(module).__name__} gives attention {name}, which attn_implementation="{NAME}" has not:'
                ' use "eager"'
            )
    described = isinstance(attention_mask, CausalMask)
    if described and not dropout and position_bias is None and _served(query, s_aux):
        found = _described(query, key, value, attention_mask, scaling, s_aux)  # type: ignore[arg-type]
        if found is not None:
            return found, None
    if isinstance(attention_mask, CausalMask):
        attention_mask = attention_mask.made()
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if s_aux is not None:
        if position_bias is not None:
            raise UnsupportedError(
                f'position_bias beside sinks: use attn_implementation="eager", not "{NAME}"'
            )
        return _with_sinks(query, key, value, attention_mask, dropout, scaling, causal, s_aux), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
        position_bias=position_bias, **options,
    )  # fmt: skip
    return found, None


def _served(query: Tensor, sinks: Tensor | None) -> bool:
    """Whether the operator takes a call: on CPUs, where it has kernels; elsewhere where PyTorch's has no sinks."""
    return transform() is None and (query.device.type == "cpu" or sinks is not None)


def _described(
    query: Tensor, key: Tensor, value: Tensor, mask: CausalMask, scaling: float | None, sinks: Tensor | None
) -> Tensor | None:
    """Attention with a mask that is described, or None for padding between tokens."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    attend = functools.partial(softmax_attention, scale=scaling, window=mask.window, sinks=sinks)
    if mask.padding is None:
        return attend(q, k, v)
    rows = mask.rows
    if rows is None:
        return None
    (B, T, H), V = q.shape[:3], v.shape[3]
    # The sequences that have a query.
    numbers = [b for b, (begin, end) in enumerate(rows.queries) if end > begin]
    queries, keys, values = (
        [x[b : b + 1, slice(*runs[b])] for b in numbers]
        for x, runs in ((q, rows.queries), (k, rows.keys), (v, rows.keys))
    )
    lengths = [x.shape[1] for x in queries]
    if not numbers:
        return q.new_zeros(B, T, H, V)
    if key.shape[2] == T and T > WHOLE:
        found = [attend(*row) for row in zip(queries, keys, values, strict=True)]
    else:
        together = attend(
            torch.cat(queries, dim=1), tuple(keys), tuple(values), cu_seqlens=Sequences(tuple(lengths))
        )
        if len(numbers) == B and min(lengths) == T:
            return together.view(B, T, H, V)
        found = list(together.split(lengths, dim=1))
    outputs = dict(zip(numbers, found, strict=True))
    nothing = q.new_zeros(1, T, H, V)
    placed = [
        F.pad(outputs[b], (0, 0, 0, 0, begin, T - end)) if b in outputs else nothing
        for b, (begin, end) in enumerate(rows.queries)
    ]
    return torch.cat(placed)


def _with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None,
    causal: bool, sinks: Tensor,
) -> Tensor:  # fmt: skip
    """Attention with sinks and any mask, written out: `[B, T, H, V]`."""
    (_, H, T, K), HKV = query.shape, key.shape[1]
    key, value = (x.repeat_interleave(H // HKV, dim=1) for x in (key, value))
    logits = (query @ key.mT).float() * (K**-0.5 if scaling is None else scaling)
    if mask is None and causal and T > 1:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    sink = sinks.float().view(1, H, 1, 1).expand(*logits.shape[:-1], 1)
    weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
    weights = F.dropout(weights, dropout).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()
