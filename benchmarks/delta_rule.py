"""The delta rule as the benchmarks call it: inputs, our implementations and those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops import gated_delta_rule, l2norm

HEADS, DIM, CHUNK = 8, 128, 64
Inputs = dict[str, Tensor]
Call = Callable[[Inputs], Tensor]


def raw_inputs(length: int, decay: str, dtype: torch.dtype, heads: int = HEADS) -> Inputs:
    """q and k before they are normalised, and decays as KDA (`"channel"`) or Gated DeltaNet (`"head"`) has them
    after initialisation. beta is float32 and representable in `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = (normal(1, length, heads, DIM).to(dtype) for _ in range(3))
    shape = (1, length, heads, DIM) if decay == "channel" else (1, length, heads)
    rate = torch.exp(2.7 * torch.rand(heads, generator=generator)).view(heads, *[1] * (len(shape) - 3))
    g = F.softplus(normal(*shape).sub_(4)).mul_(-rate)
    beta = torch.rand(1, length, heads, generator=generator).to(dtype).float()
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta}


def normalise(x: Inputs) -> Inputs:
    """The same inputs with q and k of length one, as the operators take them."""
    return {**x, "q": l2norm(x["q"]), "k": l2norm(x["k"])}


def inputs(length: int, decay: str, dtype: torch.dtype, heads: int = HEADS) -> Inputs:
    return normalise(raw_inputs(length, decay, dtype, heads))


def ours(impl: str, normalize: bool = False) -> Call:
    """With `normalize` from q and k before they are normalised."""

    def call(x: Inputs) -> Tensor:
        return gated_delta_rule(
            x["q"], x["k"], x["v"], x["g"], x["beta"],
            normalize=normalize, output_final_state=True, impl=impl,
        )[0]  # fmt: skip

    return call


def transformers(form: str, decay: str) -> Call:
    """transformers' function, `form` "chunk" or "recurrent"."""
    function: Callable[..., Any]
    if decay == "channel":
        from transformers.models.kimi_linear import modeling_kimi_linear as kimi

        function = getattr(kimi, f"{form}_kimi_delta_attention")
    else:
        from transformers.models.qwen3_next import modeling_qwen3_next as qwen

        function = getattr(qwen, f"torch_{form}_gated_delta_rule")

    def call(x: Inputs) -> Tensor:
        arguments = {"g": x["g"], "beta": x["beta"], "initial_state": None, "output_final_state": True}
        return function(x["q"], x["k"], x["v"], **arguments)[0]

    return call


def forward(call: Call, x: Inputs) -> Tensor:
    with torch.inference_mode():
        return call(x)


def backward(call: Call, x: Inputs) -> tuple[Tensor, Inputs]:
    """The output, and the gradients of its sum weighted with v, which differ from token to token."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    o = call(leaves)
    o.backward(x["v"])
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return o.detach(), gradients


def flops(length: int, heads: int = HEADS) -> int:
    """Of the forward pass in chunks, by the Kimi Linear report's equation 13; backward counts twice as much."""
    return heads * length * (6 * DIM * DIM + 3 * CHUNK * DIM + CHUNK * CHUNK)
