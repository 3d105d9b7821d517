"""What the mixers of the delta rule share: the layer around the operator, and its parts."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.layers.convolution import ShortConvolution
from intarsia.layers.gates import DecayGate
from intarsia.layers.norm import GatedNorm, OutputGate
from intarsia.layers.states import RecurrentState
from intarsia.mixers.recurrent import RecurrentMixer, delta_rule_flops
from intarsia.ops import DecodeStep, Sequences, Slots, StatePool, gated_delta_rule


def _content(weight: Tensor) -> object:
    """What is in a weight, to be compared; what cannot be read counts as changed.

    The numbers themselves, since nothing cheaper tells of every change: version counters do not count writes
    through `.data`, as optimizers and averages of weights do them. Bytes are compared several times faster than
    tensors, and equal themselves even where a number is NaN.
    """
    if not weight.is_cpu or type(weight) not in (Tensor, nn.Parameter):
        return object()
    weight = weight.contiguous()
    return weight.dtype, weight.shape, ctypes.string_at(weight.data_ptr(), weight.nbytes)


class DeltaLayer(RecurrentMixer):
    """The layer around a rule of the delta family: projections and short convolution before it, norm, gate and
    output projection behind it. A subclass says what the rule is, in `mix`.

    q, k, v = silu(conv(W x))    y = W_o (gate(output_gate_proj(x)) * rmsnorm_head(mix(x, q, k, v)))

    `heads` query and key heads of `key_dim` (K), `value_heads` value heads (HV) of `value_dim` (V); `steps` keys
    and values of each head for a token. `output_gate_proj` is None without a gate.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int,
        key_dim: int,
        value_heads: int,
        value_dim: int,
        steps: int = 1,
        conv_size: int | None,
    ) -> None:
        """The part before the rule. What the rule needs comes next, then `add_output`."""
        super().__init__(d_model)
        self.heads, self.key_dim, self.value_heads, self.value_dim = heads, key_dim, value_heads, value_dim
        self.steps = steps
        self.q_proj = nn.Linear(d_model, heads * key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, steps * heads * key_dim, bias=False)
        self.v_proj = nn.Linear(d_model, steps * value_heads * value_dim, bias=False)
        if conv_size is not None:
            channels = self.q_proj.out_features + self.k_proj.out_features + self.v_proj.out_features
            self.conv = ShortConvolution(channels, conv_size)

    def add_output(
        self, output_gate: OutputGate, output_gate_proj: nn.Module | None, norm_eps: float
    ) -> None:
        """The part behind the rule."""
        self.output_gate_proj = output_gate_proj
        self.norm = GatedNorm(self.value_dim, norm_eps, output_gate)
        self.o_proj = nn.Linear(self.value_heads * self.value_dim, self.d_model, bias=False)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        qkv, tail = self.project(x), None
        if self.conv is not None:
            qkv, tail = self.conv(qkv, None if state is None else state.conv, seqs)
        q, k, v = qkv.split(
            [self.q_proj.out_features, self.k_proj.out_features, self.v_proj.out_features], dim=-1
        )
        o, board = self.mix(x, q, k, v, None if state is None else state.board, seqs)
        z = None if self.output_gate_proj is None else self.output_gate_proj(x).unflatten(-1, o.shape[-2:])
        y = self.o_proj(self.norm(o, z).flatten(-2))
        if state is None or board is None:
            return y, None
        return y, state.after(x, seqs, board, tail)

    def project(self, x: Tensor) -> Tensor:
        """`[..., D]` to q, k and v of all heads, `[..., channels]`."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)

    def mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, board: Tensor | None, seqs: Sequences | None
    ) -> tuple[Tensor, Tensor | None]:
        """The rule: `[B, T, HV, V]` and, where there is a `board` to begin with, the one after the last token.

        `q` `[B, T, H K]`, `k` `[B, T, steps H K]` and `v` `[B, T, steps HV V]` behind the convolution; `x` `[B, T, D]`
        for what else depends on the token.
        """
        raise NotImplementedError

    @property
    def board_shape(self) -> tuple[int, int, int]:
        return self.value_heads, self.key_dim, self.value_dim

    def mixing_flops(self) -> int:
        return self.steps * delta_rule_flops(*self.board_shape)


class DeltaMixer(DeltaLayer):
    """The delta rule, once for each token; the mixers of it differ in the decay and in the ranks of projections.

    q, k = l2norm(silu(conv(W x)))    v = silu(conv(W x))    beta = sigmoid(W x)    g = decay(decay_proj(x))
    y = W_o (gate(output_gate_proj(x)) * rmsnorm_head(gated_delta_rule(q, k, v, g, beta)))

    The decay gives `[B, T, HV, K]`, or `[B, T, HV, 1]` for one number a head, or is None. With `normalize` False q
    and k are taken as they are. A few tokens that follow a state go through one native step, where it is there.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int,
        key_dim: int,
        value_heads: int,
        value_dim: int,
        conv_size: int | None,
        decay_proj: nn.Module | None,
        decay: DecayGate | None,
        output_gate: OutputGate,
        output_gate_proj: nn.Module | None,
        negative_eigenvalues: bool,
        norm_eps: float,
        normalize: bool = True,
    ) -> None:
        super().__init__(
            d_model,
            heads=heads,
            key_dim=key_dim,
            value_heads=value_heads,
            value_dim=value_dim,
            conv_size=conv_size,
        )
        self.beta_max = 2 if negative_eigenvalues else 1
        self.normalize = normalize
        self.beta_proj = nn.Linear(d_model, value_heads, bias=False)
        self.decay_proj, self.decay = decay_proj, decay
        self.add_output(output_gate, output_gate_proj, norm_eps)
        self._step: tuple[list[object], DecodeStep] | None = None

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        if (
            state is not None
            and seqs is None
            and not torch.is_grad_enabled()
            and DecodeStep.is_faster(x.shape[1], x, state.board, state.conv)
            and self._has_weights()
        ):
            return self._decode(x, state)
        return super().forward(x, state, seqs)

    def mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, board: Tensor | None, seqs: Sequences | None
    ) -> tuple[Tensor, Tensor | None]:
        g = None if self.decay_proj is None else self.decay_proj(x)
        if g is not None and self.decay is not None and self.decay.channels > 1:
            g = g.unflatten(-1, (self.value_heads, self.key_dim))
        return gated_delta_rule(
            q.unflatten(-1, (self.heads, self.key_dim)),
            k.unflatten(-1, (self.heads, self.key_dim)),
            v.unflatten(-1, (self.value_heads, self.value_dim)),
            g,
            self.beta_proj(x),
            normalize=self.normalize,
            gate=None if self.decay is None else self.decay(),
            beta_max=self.beta_max,
            initial_state=board,
            output_final_state=board is not None,
            cu_seqlens=seqs,
        )

    def _has_weights(self) -> bool:
        """Whether the decay's weights can be read here: not where FSDP gathers them when `decay` is called."""
        return self.decay is None or type(self.decay.A_log) in (Tensor, nn.Parameter)

    def _decode(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """The same for a few tokens: all between the projections in one step, which reads each state once and
        writes the next one."""
        rows = x.flatten(0, 1)
        pool = StatePool(state.board.contiguous(), None if state.conv is None else state.conv.contiguous())
        following = pool.new_like()
        o = self._decode_step()(
            self.project(rows),
            pool,
            Slots.of_rows(*x.shape[:2]),
            g=None if self.decay_proj is None else self.decay_proj(rows),
            beta=self.beta_proj(rows),
            z=None if self.output_gate_proj is None else self.output_gate_proj(rows),
            into=following,
        )
        y = self.o_proj(o).view(x.shape)
        return y, state.after(x, None, following.board, following.conv)

    def _decode_step(self) -> DecodeStep:
        """The step for the weights as they are: a new one when they have changed."""
        decay, norm, conv = self.decay, self.norm, None if self.conv is None else self.conv.weight
        decay_weights = (None, None) if decay is None else (decay.A_log, decay.dt_bias)
        content = [_content(w) for w in (*decay_weights, norm.weight, conv) if w is not None]
        if self._step is None or self._step[0] != content:
            step = DecodeStep(
                heads=self.heads,
                key_dim=self.key_dim,
                value_heads=self.value_heads,
                value_dim=self.value_dim,
                decay="none" if decay is None else "head" if decay.channels == 1 else "channel",
                gate=None if decay is None else decay.gate(),
                beta_max=self.beta_max,
                normalize=self.normalize,
                conv_weight=conv,
                activation="silu",
                norm_weight=norm.weight,
                norm_eps=norm.eps,
                norm_gate=None if norm.gate == "none" else norm.gate,
            )
            self._step = content, step
        return self._step[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_step": None}  # made again where the copy decodes
