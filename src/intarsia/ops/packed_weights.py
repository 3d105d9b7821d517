"""Weights in the form that products with few rows read: as they are, or as integers of 8 and 4 bits with scales.

A product with one row reads every weight once and does next to nothing with it, so that it takes as long as reading
them. Half the bytes are half the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError

WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]

FLOATING = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}

STEP, INT4_BLOCK = 32, 128
"""As in csrc/few_rows_task.h: a row of int8 is padded to whole steps, one of int4 to whole blocks."""

_PIECE = 1 << 18
"""Numbers that are quantised or made floating-point at a time: so few that what is tried with them stays in the cache,
and that no memory beside the weights is worth telling."""


@dataclass(frozen=True)
class PackedWeights:
    """Matrices `[N, K]`, or several of them `[E, N, K]`, ready for `packed_linear`. For inference: nothing is trained.

    An integer stands for `(q - zero) scale`: q in -127 .. 127 of int8 and -8 .. 7 of int4; a scale, and a zero where
    there are some, belongs to `group` numbers of a row.
    """

    format: WeightFormat
    shape: tuple[int, ...]
    """`(N, K)` or `(E, N, K)`."""
    group: int
    """How many numbers of a row share a scale: K where a row has one."""
    data: Tensor
    """`shape` in the format's dtype, or uint8 `[..., N, bytes of a row]`: int8 as it is, int4 in blocks of 128 numbers,
    of which bits `4 i` to `4 i + 3` of the 16-bit word j are number `32 i + j`, plus 8."""
    scales: Tensor | None
    """`[..., N, groups]` bfloat16, of integers."""
    zeros: Tensor | None
    """The same, whole numbers in bfloat16, where a scale alone would waste half of the integers."""

    @property
    def matrices(self) -> int:
        """E, or 1."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def nbytes(self) -> int:
        """All that a product with every matrix reads."""
        return sum(x.nbytes for x in (self.data, self.scales, self.zeros) if x is not None)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> PackedWeights:
        """The same on another device."""
        moved = (None if x is None else x.to(device) for x in (self.data, self.scales, self.zeros))
        data, scales, zeros = moved
        assert data is not None
        return PackedWeights(self.format, self.shape, self.group, data, scales, zeros)

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as numbers, `shape` in `dtype`."""
        if self.format in FLOATING:
            return self.data.to(dtype)
        pieces = [rows.to(dtype) for rows in self.pieces()]
        return torch.cat(pieces).view(self.shape)

    def pieces(self, rows: int | None = None) -> Iterator[Tensor]:
        """Rows of all matrices in their order, some at a time, `[rows, K]` in float32."""
        K = self.shape[-1]
        each = max(1, _PIECE // K) if rows is None else rows
        data = self.data.flatten(0, -2)
        for first in range(0, data.shape[0], each):
            part = slice(first, first + each)
            if self.format in FLOATING:
                yield data[part].float()
                continue
            q = data[part].view(torch.int8) if self.format == "int8" else _nibbles(data[part])
            assert self.scales is not None
            numbers = q[:, :K].float()
            if self.zeros is not None:
                numbers -= self._of_each(self.zeros, part)
            yield numbers * self._of_each(self.scales, part)

    def _of_each(self, of_groups: Tensor, part: slice) -> Tensor:
        wide = of_groups.flatten(0, -2)[part].float()
        return wide.repeat_interleave(self.group, dim=-1)[:, : self.shape[-1]]

    def __getstate__(self) -> dict[str, Any]:
        # Not what implementations keep beside the fields, for instance addresses.
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


def pack_weights(
    weight: Tensor, format: WeightFormat, *, group: int | None = None, zeros: bool = False
) -> PackedWeights:
    """Bring weights into the form that `packed_linear` reads.

    float32 and bfloat16 are rounded to, and share memory with `weight` where it has that dtype and no gaps. Integers
    are the nearest ones for the scale, of a few, whose squared errors are least in each group.

    Args:
        weight: `[N, K]` or `[E, N, K]`, floating-point and finite.
        format: `"float32"`, `"bfloat16"`, `"int8"` or `"int4"`.
        group: how many numbers of a row share a scale: of int8 a multiple of 32, a whole row by default; of int4 32, 64
            (the default) or a multiple of 128.
        zeros: give each group of integers a zero of its own, for weights that lie to one side.

    Raises:
        ShapeError: a weight that is no matrix, or has no number.
        ConfigError: an unknown format, a group that it cannot have, or weights that are not finite.
    """
    if weight.dim() not in (2, 3) or weight.numel() == 0 or not weight.is_floating_point():
        raise ShapeError(
            f"weights must be floating-point numbers [N, K] or [E, N, K]; got {list(weight.shape)} {weight.dtype}"
        )
    check_format(format, group, zeros)
    weight, shape, K = weight.detach(), tuple(weight.shape), weight.shape[-1]
    if format in FLOATING:
        return PackedWeights(format, shape, K, weight.to(FLOATING[format]).contiguous(), None, None)
    group = _checked_group(format, K, group)
    rows, each = weight.flatten(0, -2), max(1, _PIECE // K)
    parts = [_quantised(part, format, group, zeros) for part in rows.split(each)]
    data, scales, offsets = (torch.cat(x) for x in zip(*parts, strict=True))
    lead = shape[:-1]
    return PackedWeights(
        format,
        shape,
        group,
        data.view(*lead, -1),
        scales.view(*lead, -1),
        offsets.view(*lead, -1) if zeros else None,
    )


def empty_packed(
    shape: tuple[int, ...],
    format: WeightFormat,
    *,
    group: int | None = None,
    zeros: bool = False,
    device: torch.device | str = "cpu",
) -> PackedWeights:
    """What `pack_weights` makes of a weight of this shape, without its numbers: room for them, to be filled.

    Arguments and errors are those of `pack_weights`.
    """
    check_format(format, group, zeros)
    K = shape[-1]
    if format in FLOATING:
        room = torch.empty(shape, dtype=FLOATING[format], device=device)
        return PackedWeights(format, shape, K, room, None, None)
    group = _checked_group(format, K, group)
    row = K + -K % STEP if format == "int8" else (K + -K % INT4_BLOCK) // 2
    of_groups = (*shape[:-1], -(-K // group))
    return PackedWeights(
        format,
        shape,
        group,
        torch.empty(*shape[:-1], row, dtype=torch.uint8, device=device),
        torch.empty(of_groups, dtype=torch.bfloat16, device=device),
        torch.empty(of_groups, dtype=torch.bfloat16, device=device) if zeros else None,
    )


def check_format(format: str, group: int | None, zeros: bool) -> None:
    """Raise ConfigError for a format that there is not, or options that it cannot have."""
    if format not in get_args(WeightFormat):
        raise ConfigError(f"weights can be {', '.join(get_args(WeightFormat))}; got {format!r}")
    if format in FLOATING and (group is not None or zeros):
        raise ConfigError(f"{format} weights have no scales: group and zeros are for int8 and int4")


def _checked_group(format: str, K: int, group: int | None) -> int:
    if group is None:
        group = K if format == "int8" else 64
    step = STEP if format == "int8" else INT4_BLOCK
    whole = group >= K
    if group < 1 or not (whole or group % step == 0 or (format == "int4" and group in (32, 64))):
        allowed = "a multiple of 32" if format == "int8" else "32, 64 or a multiple of 128"
        raise ConfigError(f"a group of {format} is {allowed}, or a whole row of {K}; got {group}")
    if not whole:
        return group
    # A whole row: of int4 in whole blocks, since a smaller group would be read as a part of one.
    return K if format == "int8" else -(-K // INT4_BLOCK) * INT4_BLOCK


def _quantised(rows: Tensor, format: str, group: int, zeros: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Packed rows, scales and zeros of `rows` `[R, K]`."""
    R, K = rows.shape
    rows = rows.float()
    if not bool(torch.isfinite(rows).all()):
        raise ConfigError("weights that are not finite cannot be made integers")
    groups = -(-K // group)
    padded = F.pad(rows, (0, groups * group - K)).view(R, groups, group)
    if groups * group > K:
        # What fills up the last group must not move its bounds.
        padded[:, -1, K - (groups - 1) * group :] = padded[:, -1, :1]
    q, scales, offsets = _nearest(
        padded, -127 if format == "int8" else -8, 127 if format == "int8" else 7, zeros
    )
    q = q.view(R, -1)[:, :K]
    if format == "int8":
        q = F.pad(q, (0, -K % STEP))
        return q.to(torch.int8).view(torch.uint8), scales, offsets
    return _packed_nibbles(q), scales, offsets


_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""How far of the largest number the integers reach: what is cut off there is gained in the others' precision."""


def _nearest(x: Tensor, low: int, high: int, zeros: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Integers `[R, groups, group]`, scales and zeros `[R, groups]` (bfloat16) for the numbers x."""
    top, bottom = x.amax(-1), x.amin(-1)
    if zeros:
        top, bottom = top.clamp(min=0), bottom.clamp(max=0)
        full = (top - bottom) / (high - low)
    else:
        # The end that has one integer more is for the larger side.
        negative = -bottom > top
        full = torch.where(negative, bottom / low, -top / low if low + high < 0 else top / high)
        full = torch.where(negative | (low + high == 0), full, -full)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    error = torch.full_like(top, torch.inf)
    # More than the four bits of int4 leave nothing to gain.
    for share in _SHRUNK if high < 127 else _SHRUNK[:1]:
        # The widest is not rounded down, which would cut off the largest numbers.
        scale = (full * (1 + 2.0**-8 if share == 1 else share)).bfloat16()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        wide = scale.float()[..., None]
        zero = (low - bottom / scale.float()).round() if zeros else torch.zeros_like(top)
        q = (x / wide + zero[..., None]).round().clamp(low, high)
        found = ((q - zero[..., None]) * wide - x).square().sum(-1)
        better = found < error
        error = torch.where(better, found, error)
        if best is None:
            best = q, scale, zero
        else:
            best = (
                torch.where(better[..., None], q, best[0]),
                torch.where(better, scale, best[1]),
                torch.where(better, zero, best[2]),
            )
    assert best is not None
    return best[0], best[1], best[2].bfloat16()


def _packed_nibbles(q: Tensor) -> Tensor:
    """Integers -8 .. 7 `[R, K]` in blocks, `[R, bytes]` uint8."""
    R, K = q.shape
    blocks = F.pad(q, (0, -K % INT4_BLOCK)).view(R, -1, INT4_BLOCK // STEP, STEP).to(torch.int32) + 8
    shifts = 4 * torch.arange(INT4_BLOCK // STEP, dtype=torch.int32, device=q.device)
    words = (blocks << shifts[:, None]).sum(2)
    # The low byte first, whatever this machine's own order is.
    both = torch.stack([words & 255, words >> 8], dim=-1)
    return both.to(torch.uint8).view(R, -1)


def _nibbles(data: Tensor) -> Tensor:
    """The other way round: `[R, bytes]` uint8 to integers `[R, K in whole blocks]`."""
    both = data.view(data.shape[0], -1, STEP, 2).to(torch.int32)
    words = both[..., 0] | both[..., 1] << 8
    shifts = 4 * torch.arange(INT4_BLOCK // STEP, dtype=torch.int32, device=data.device)
    return ((words[:, :, None] >> shifts[:, None] & 15) - 8).view(data.shape[0], -1)
