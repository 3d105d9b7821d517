"""How a model computes a few tokens of each sequence: next to nothing is called one by one.

Between two exchanges of tokens every token is worked on alone. All that is done to it there, from one mixer's last
product over the feed-forward to the next mixer's first, is one `RowProgram`, and so one call. The blocks remain what
says what is to be done; `tests/model/test_few_tokens.py` holds both to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from intarsia.layers.norm import RMSNorm
from intarsia.layers.packed import weights_of
from intarsia.layers.parted import Parted, Rows
from intarsia.layers.states import State
from intarsia.mixers.base import Layer
from intarsia.model.block import Block, Norm
from intarsia.model.experts import PackedExperts
from intarsia.model.feed_forward import SwiGLU
from intarsia.model.states import ModelStates
from intarsia.ops import PackedWeights, Sequences, pack_weights
from intarsia.ops.row_program import Choice, Place, Product, RowProgram

FEW = 32
"""Tokens of all sequences together, up to which this is the faster way: of more, PyTorch's products are."""

Between = Callable[[Rows, tuple[int, int], Any, Sequences | None], tuple[Tensor, State | None]]
"""What comes after a program: from its results, the shape `[B, T]` of the tokens, and a state where one is read, to the
next program's second input `[tokens, numbers]` and the state after it."""


class _Stage(NamedTuple):
    program: RowProgram
    between: Between
    layer: int | None
    """Whose state it reads."""


class FewTokens:
    """A model's blocks and head, as programs and what is between them."""

    def __init__(
        self,
        blocks: Sequence[Block],
        layers: Sequence[Layer[Any]],
        norm: RMSNorm,
        head: PackedWeights,
        head_scale: float = 1.0,
    ) -> None:
        """`layers` compute the mixers of `blocks`; `norm` and `head` come behind them, and between these a factor."""
        self._branch_scale = blocks[0].branch_scale
        builder = _Builder(norm, self._branch_scale)
        for number, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
            builder.add_mixer(block, number, layer)
            if block.feed_forward is not None:
                builder.add_feed_forward(block)
        self._stages, self._last = builder.stages, builder.program
        self._head = RowProgram(norm.weight.dtype)
        x = self._head.input(norm.weight.shape[0])
        # Logits are float32: nothing is gained by rounding them before.
        logits = self._head.result(head.shape[0], dtype=torch.float32)
        self._head.products(
            [Product(builder.norm_of_stream(self._head, x, norm, factor=head_scale), head, logits)]
        )

    @staticmethod
    def of(
        blocks: Sequence[Block],
        layers: Sequence[Layer[Any]],
        norm: Norm,
        head: nn.Module,
        head_scale: float = 1.0,
    ) -> FewTokens | None:
        """The same, or None where there are no kernels for the model."""
        others = any(block.mixer.takes_handed or block.mixer_streams is not None for block in blocks)
        if others or not isinstance(norm, RMSNorm):
            return None
        weight, weights = norm.weight, weights_of(head)
        plain = type(weight) in (Tensor, nn.Parameter) and RowProgram.serves(weight.dtype, weight.device)
        if not plain or weights is None:
            return None
        return FewTokens(blocks, layers, norm, weights, head_scale)

    @property
    def stages(self) -> int:
        """How often something comes between programs: once a layer, where all of its parts are known."""
        return len(self._stages)

    @staticmethod
    def takes(tokens: Tensor) -> bool:
        """Whether so many tokens are few, and nobody in PyTorch wants to look on."""
        return 0 < tokens.numel() <= FEW and RowProgram.can_run()

    def __call__(
        self, x: Tensor, states: ModelStates, seqs: Sequences | None, places: list[int] | slice
    ) -> tuple[Tensor, ModelStates]:
        """From embedded tokens `[B, T, D]`, which are overwritten, and states to the logits of those at `places` along
        T, `[B, places, V]` float32, and the states after all of them."""
        shape, rows = (x.shape[0], x.shape[1]), x.flatten(0, 1)
        if self._branch_scale != 1:
            # What is added keeps its size, and the stream is divided: its norms are of the same direction.
            x = x / self._branch_scale
            rows = x.flatten(0, 1)
        inputs: tuple[Tensor, ...] = (rows,)
        after: list[State] = []
        for program, between, layer in self._stages:
            y, state = between(program(*inputs), shape, None if layer is None else states.layers[layer], seqs)
            inputs = (rows, y)
            if state is not None:
                after.append(state)
        self._last(*inputs)
        if shape[1] > 1:
            x = x[:, places]
        (logits,) = self._head(x.reshape(-1, x.shape[2]))
        return logits.view(*x.shape[:2], -1), ModelStates(tuple(after))


def _maps_of(module: nn.Module) -> tuple[PackedWeights, ...] | None:
    """The weights of a SwiGLU; None where it is none, or they cannot be read."""
    if type(module) is not SwiGLU or not module.is_plain:
        return None
    found = [weights_of(each) for each in (module.gate, module.up, module.down)]
    return None if None in found else tuple(each for each in found if each is not None)


class _Builder:
    """Lists blocks in programs. `x` is where the residual stream is in the current one."""

    def __init__(self, norm: RMSNorm, branch_scale: float) -> None:
        """Of blocks that multiply with `branch_scale` what they add, and a `norm` behind them."""
        self._width, self._dtype = norm.weight.shape[0], norm.weight.dtype
        self._branch_scale = branch_scale
        self.stages: list[_Stage] = []
        self._next()

    def add_mixer(self, block: Block, number: int, layer: Layer[Any]) -> None:
        """`layer` is what computes the mixer of a block."""
        h = self._normed(block, block.mixer_norm)
        if isinstance(layer, Parted) and layer.parts:
            layer.begin(self.program, h)
            self._then(layer.exchange, number)
            self._add(block, layer.finish(self.program), block.mixer_norm)
            return

        def whole(
            rows: Rows, shape: tuple[int, int], state: Any, seqs: Sequences | None
        ) -> tuple[Tensor, State | None]:
            y, state = layer(rows[0].unflatten(0, shape), state, seqs)
            return y.flatten(0, 1), state

        self._leave(h, whole, number)
        self._add(block, self.program.input(self._width), block.mixer_norm)

    def add_feed_forward(self, block: Block) -> None:
        """What follows the mixer of a block."""
        feed_forward, norm = block.feed_forward, block.feed_forward_norm
        assert feed_forward is not None
        assert norm is not None
        h = self._normed(block, norm)
        routed = feed_forward if isinstance(feed_forward, PackedExperts) and feed_forward.are_plain else None
        dense = routed.shared if routed else feed_forward
        maps = () if dense is None else _maps_of(dense)
        if maps is not None and (maps or routed):
            y = self._feed_forward(h, maps, routed)
        else:

            def whole(
                rows: Rows, shape: tuple[int, int], state: Any, seqs: Sequences | None
            ) -> tuple[Tensor, State | None]:
                return feed_forward(rows[0]), None

            self._leave(h, whole, None)
            y = self.program.input(self._width)
        self._add(block, y, norm)

    def _feed_forward(self, h: Place, maps: tuple[PackedWeights, ...], routed: PackedExperts | None) -> Place:
        """A SwiGLU of the weights `maps` (none: there is none), `routed` experts, or both."""
        program = self.program
        products: list[Product] = []
        if maps:
            gate, up, down = maps
            hidden = program.room(gate.shape[0]), program.room(gate.shape[0])
            products = [Product(h, gate, hidden[0]), Product(h, up, hidden[1])]
        if routed is not None:
            logits = program.room(routed.config.num_experts, torch.float32)
            products.append(Product(h, pack_weights(routed.router.weight, "float32"), logits))
        program.products(products)
        y = program.product(program.swiglu(*hidden), down) if maps else None
        if routed is None:
            assert y is not None
            return y
        c = routed.config
        choice = Choice(
            active=c.num_active,
            groups=c.num_groups,
            active_groups=c.num_active_groups,
            softmax=c.scores == "softmax",
            biased=c.routing_weights == "biased",
            normalize=c.normalize,
            factor=c.routed_scaling_factor,
            bias=routed.router.bias,
        )
        found = program.experts(h, logits, choice, *routed.all_packed())
        if y is not None:
            program.add(y, found)
        return found

    def _normed(self, block: Block, norm: Norm) -> Place:
        """What goes into a part of a block."""
        if block.placement == "after":
            return self.x
        to = self.x if block.placement == "stream" else None
        return self.norm_of_stream(self.program, self.x, norm, to)

    def _add(self, block: Block, y: Place, norm: Norm) -> None:
        """Add what a part gave to the residual stream; `"stream"` has its norm there already."""
        if block.placement == "after":
            y = self.norm_of_stream(self.program, y, norm, to=y)
        self.program.add(y, self.x, block.residual_scale if block.placement == "stream" else 1.0)

    def norm_of_stream(
        self, program: RowProgram, x: Place, norm: Norm, to: Place | None = None, factor: float = 1.0
    ) -> Place:
        """List a norm of the residual stream, which is divided by the branches' factor, and a factor behind it."""
        assert isinstance(norm, RMSNorm), "of other norms there are no programs"
        weight = norm.weight.detach().float()
        weight = 1 + weight if norm.zero_centered else weight
        return program.norm(x, factor * weight, norm.eps / self._branch_scale**2, to)

    def _leave(self, h: Place, between: Between, layer: int | None) -> None:
        """Let `between` have h as the program's only result."""
        self.program.copy(h, self.program.result(self._width), self._width)
        self._then(between, layer)

    def _then(self, between: Between, layer: int | None) -> None:
        self.stages.append(_Stage(self.program, between, layer))
        self._next()

    def _next(self) -> None:
        self.program = RowProgram(self._dtype)
        self.x = self.program.input(self._width)
