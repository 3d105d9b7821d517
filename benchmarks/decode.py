"""The step of one token as the benchmarks call it: ours, our operators one by one, vLLM's and transformers'.

Three forms, each with a state that goes on from call to call:

    rule     the delta rule on normalised q and k, log-decays and write strengths
    gates    from what projections give: q and k divided by their lengths, gate and sigmoid, then the rule
    layer    the short convolution before that and the gated RMSNorm behind it as well
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from delta_rule import DIM, HEADS, Inputs
from intarsia.ops import (
    DecodeStep,
    Gate,
    Slots,
    gated_delta_rule,
    gated_rms_norm,
    l2norm,
    short_convolution,
)

FORMS = ("rule", "gates", "layer")
CHANNELS = 3 * HEADS * DIM
EPS = 1e-5
Stepper = Callable[[], Tensor]


def step_inputs(sequences: int, decay: str, dtype: torch.dtype) -> Inputs:
    """Rows of one token of each sequence, and the weights of a layer."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    decays = HEADS * DIM if decay == "channel" else HEADS
    return {
        "qkv": normal(sequences, CHANNELS).to(dtype),
        "f": normal(sequences, decays).to(dtype),
        "b": normal(sequences, HEADS).to(dtype),
        "z": normal(sequences, HEADS * DIM).to(dtype),
        "A_log": 2.7 * torch.rand(HEADS, generator=generator),
        "dt_bias": normal(decays) - 4,
        "conv_weight": (0.5 * normal(CHANNELS, 4)).to(dtype),
        "norm_weight": torch.ones(DIM, dtype=dtype),
    }


def parts(x: Inputs, decay: str, form: str) -> Inputs:
    """q, k, v `[sequences, 1, H, D]`, g and beta as the rule takes them (`form` "rule") or before that."""
    q, k, v = (y.unflatten(1, (1, HEADS, DIM)) for y in x["qkv"].split(HEADS * DIM, dim=1))
    g, beta = x["f"][:, None], x["b"][:, None]
    g = g.unflatten(2, (HEADS, DIM)) if decay == "channel" else g
    if form == "rule":
        q, k, g = l2norm(q), l2norm(k), Gate(x["A_log"], x["dt_bias"]).log_decay(g)
        beta = torch.sigmoid(beta.float())
    return {"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous(), "g": g, "beta": beta}


def our_step(x: Inputs, decay: str, form: str) -> Stepper:
    """`DecodeStep` as a server calls it: slots of a pool, out of order, and room for the outputs."""
    sequences = x["qkv"].shape[0]
    step = DecodeStep(
        heads=HEADS,
        key_dim=DIM,
        value_heads=HEADS,
        value_dim=DIM,
        decay="channel" if decay == "channel" else "head",
        gate=None if form == "rule" else Gate(x["A_log"], x["dt_bias"]),
        beta_max=None if form == "rule" else 1.0,
        normalize=form != "rule",
        conv_weight=x["conv_weight"] if form == "layer" else None,
        activation="silu" if form == "layer" else None,
        norm_weight=x["norm_weight"] if form == "layer" else None,
        norm_eps=EPS,
        norm_gate="sigmoid" if form == "layer" else None,
        impl="cpu",
    )
    given = parts(x, decay, form)
    qkv = torch.cat([given[name].flatten(1) for name in ("q", "k", "v")], dim=1)
    g, beta, z = given["g"].flatten(1), given["beta"].flatten(1), x["z"] if form == "layer" else None
    pool = step.new_pool(sequences)
    slots = Slots(torch.randperm(sequences, generator=torch.Generator().manual_seed(1)).tolist())
    out = torch.empty(sequences, step.form.values, dtype=qkv.dtype)
    return lambda: step(qkv, pool, slots, g=g, beta=beta, z=z, out=out)


def our_operators(x: Inputs, decay: str, form: str, impl: str) -> Stepper:
    """The operators one after the other, with states as values."""
    gate = None if form == "rule" else Gate(x["A_log"], x["dt_bias"])
    sequences, dtype = x["qkv"].shape[0], x["qkv"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    board = torch.zeros(sequences, HEADS, DIM, DIM, dtype=wide)
    past = torch.zeros(sequences, 3, CHANNELS, dtype=wide)
    given = parts(x, decay, form)
    z = x["z"].view(sequences, 1, HEADS, DIM)

    def step() -> Tensor:
        nonlocal board, past
        q, k, v = given["q"], given["k"], given["v"]
        if form == "layer":
            qkv, new_past = short_convolution(
                x["qkv"][:, None],
                x["conv_weight"],
                activation="silu",
                initial_state=past,
                output_final_state=True,
            )
            assert new_past is not None
            past = new_past
            q, k, v = (y.unflatten(2, (HEADS, DIM)) for y in qkv.split(HEADS * DIM, dim=2))
        o, new_board = gated_delta_rule(
            q, k, v, given["g"], given["beta"], normalize=form != "rule", gate=gate,
            beta_max=None if form == "rule" else 1.0, initial_state=board, output_final_state=True, impl=impl,
        )  # fmt: skip
        assert new_board is not None
        board = new_board
        return gated_rms_norm(o, z, x["norm_weight"], eps=EPS) if form == "layer" else o

    return step


def vllm_step(library: str, x: Inputs) -> Stepper:
    """vLLM's step of Gated DeltaNet, `form` "gates"; bfloat16 and a decay of each head."""
    torch.ops.load_library(library)
    function = torch.ops._C.fused_sigmoid_gating_delta_rule_update_cpu
    sequences = x["qkv"].shape[0]
    given = parts(x, "head", "gates")
    q, k, v = (given[name].transpose(0, 1).contiguous() for name in ("q", "k", "v"))
    state = torch.zeros(sequences, HEADS, DIM, DIM)
    spans, index = (torch.arange(n, dtype=torch.int32) for n in (sequences + 1, sequences))
    bias = x["dt_bias"].to(q.dtype)
    return lambda: function(x["A_log"], bias, q, k, v, x["f"], x["b"], state, index, spans, True, 1.0, 20.0)


def transformers_step(x: Inputs, decay: str) -> Stepper:
    """transformers' recurrent function, `form` "rule"."""
    if decay == "channel":
        from transformers.models.kimi_linear.modeling_kimi_linear import (
            recurrent_kimi_delta_attention as function,
        )
    else:
        from transformers.models.qwen3_next.modeling_qwen3_next import (
            torch_recurrent_gated_delta_rule as function,
        )
    given = parts(x, decay, "rule")
    state = torch.zeros(x["qkv"].shape[0], HEADS, DIM, DIM)

    def step() -> Tensor:
        nonlocal state
        arguments = {"g": given["g"], "beta": given["beta"], "output_final_state": True}
        o, state = function(given["q"], given["k"], given["v"], initial_state=state, **arguments)
        return o

    return step


def exact_outputs(x: Inputs, decay: str, form: str, calls: int) -> list[Tensor]:
    """What the first calls return, by the float64 reference."""
    step = our_operators({name: y.double() for name, y in x.items()}, decay, form, "reference")
    return [step() for _ in range(calls)]
