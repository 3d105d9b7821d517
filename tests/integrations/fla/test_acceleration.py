"""The layers of flash-linear-attention on CPUs: replaced, right, and back again."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import intarsia.integrations
from intarsia.errors import MissingExtraError, UnsupportedError
from intarsia.integrations import fla as functions
from intarsia.integrations.fla import acceleration as integration
from intarsia.integrations.fla import modules as fla_modules

INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("fla", "triton", "einops"))
installed = pytest.mark.skipif(not INSTALLED, reason="flash-linear-attention is not installed")


@pytest.mark.skipif(INSTALLED, reason="flash-linear-attention is installed")
def test_without_the_library_it_says_what_to_install() -> None:
    with pytest.raises(MissingExtraError, match="pip install 'flash-linear-attention"):
        intarsia.integrations.accelerate_fla()


def test_every_function_has_its_place() -> None:
    rules = {name for names in integration.OPERATORS.values() for name in names}
    beside = {name for names in integration.BESIDE.values() for name in names}
    modules = {"ShortConvolution", "FusedRMSNormGated"}  # call the functions
    same = {"chunk_gdn", "fused_recurrent_gdn"}  # other names of functions that are there
    assert rules | beside | modules | same | {"causal_conv1d_fn"} == set(functions.__all__)
    named = {name for names in integration.MODULES.values() for name in names}
    assert named == {
        name for name, value in vars(fla_modules).items()
        if inspect.isfunction(value) and value.__module__ == fla_modules.__name__ and not name.startswith("_")
    }  # fmt: skip


# A library with the names of flash-linear-attention, whose functions cannot run: what is replaced where shows on it
# without the real one.
STAND_IN = {
    "__init__.py": '__version__ = "0.6.0"\n',
    "ops/__init__.py": "from .gsa import chunk_gsa\nfrom .kda import chunk_kda\n",
    "ops/kda/__init__.py": "from .chunk import chunk_kda\n",
    "ops/kda/chunk.py": 'def chunk_kda(*args, **options):\n    return "theirs"\n',
    "ops/gsa/__init__.py": 'def chunk_gsa(*args, **options):\n    return "theirs"\n',
    "modules/__init__.py": "",
    "modules/activations/__init__.py": "from .ops import ACT2FN, swish\n",
    "modules/activations/ops.py": 'def swish(x):\n    return "theirs"\n\n\nACT2FN = {"silu": swish}\n',
    "layers/__init__.py": "from fla.modules.activations import swish as act\nfrom fla.ops import *\n",
}
SCRIPT = """
import torch
import fla.layers as layers
from fla.modules.activations import ACT2FN
from intarsia.integrations import fla as functions
from intarsia.errors import UnsupportedError
from intarsia.integrations import accelerate_fla

q = torch.randn(1, 5, 2, 4)
args = (q, q, q, -q.square(), q[..., 0].sigmoid())
before = layers.chunk_kda
with accelerate_fla() as outer:
    assert "layers.chunk_kda" in outer.patched and "ops.kda.chunk.chunk_kda" in outer.patched, outer.patched
    assert "modules.activations.ops.ACT2FN.silu" in outer.patched
    assert "layers, modules, ops" in repr(outer)
    inner = accelerate_fla()
    torch.testing.assert_close(layers.chunk_kda(*args)[0], functions.chunk_kda(*args)[0])
    torch.testing.assert_close(layers.act(q), q * q.sigmoid())
    torch.testing.assert_close(ACT2FN["silu"](q), q * q.sigmoid())
    assert layers.chunk_kda(*(x.to("meta") for x in args)) == "theirs"
    try:
        layers.chunk_gsa(q, q, q, q)
    except UnsupportedError as error:
        assert "chunk_gsa does not run on a CPU" in str(error)
    else:
        raise AssertionError
    inner.undo()
    assert layers.chunk_kda is not before
assert layers.chunk_kda is before and layers.act(q) == ACT2FN["silu"](q) == layers.chunk_gsa(q) == "theirs"
fla = __import__("fla")
fla.__version__ = "0.5.2"
try:
    accelerate_fla()
except UnsupportedError as error:
    assert "0.5.2 is too old" in str(error)
else:
    raise AssertionError
"""


def test_names_are_replaced_wherever_they_stand_and_put_back(tmp_path: Path) -> None:
    for name, text in STAND_IN.items():
        (tmp_path / "fla" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fla" / name).write_text(text, encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# With the real library


@pytest.fixture
def accelerated() -> Iterator[Any]:
    with intarsia.integrations.accelerate_fla() as acceleration:
        yield acceleration


@installed
def test_every_place_exists(accelerated: Any) -> None:
    for path, name, _ in integration._served():
        assert f"{path.removeprefix('fla.')}.{name}" in accelerated.patched
    public = importlib.import_module("fla.ops").__all__
    assert {name.rpartition(".")[2] for name in accelerated.patched} >= set(public)


OPTIONS: dict[str, dict[str, Any]] = {
    "Comba": {}, "DeltaNet": {}, "GLA": {}, "GatedDeltaNet": {}, "GatedDeltaProduct": {},
    "HGRN": {"num_heads": None}, "HGRN2": {"num_heads": None, "expand_ratio": 16}, "KDA": {}, "LinearAttention": {},
    "Mamba": {}, "Mamba2": {"num_heads": 8}, "RWKV7": {}, "RetNet": {}, "YOCO": {}, "ForgettingTransformer": {},
}  # fmt: skip


@installed
@pytest.mark.parametrize("name", OPTIONS)
def test_models_train_and_decode(name: str, accelerated: Any) -> None:
    import fla.models

    options = {"num_heads": 4, "head_dim": 16, **OPTIONS[name]}
    config = getattr(fla.models, f"{name}Config")(
        hidden_size=64, num_hidden_layers=2, vocab_size=100, intermediate_size=64, fuse_cross_entropy=False,
        max_position_embeddings=200, **{n: y for n, y in options.items() if y is not None},
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(fla.models, f"{name}ForCausalLM")(config)
    tokens = torch.randint(3, 100, (2, 70))
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    ones = torch.ones_like(tokens)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        out = model(tokens[:, :50], attention_mask=ones[:, :50], use_cache=True)
        parts = [out.logits]
        for t in range(50, 70):
            out = model(
                tokens[:, t : t + 1], attention_mask=ones[:, : t + 1], past_key_values=out.past_key_values,
                use_cache=True,
            )  # fmt: skip
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        mask = ones.clone()
        mask[1, :7] = 0  # padding on the left
        padded = model(tokens, attention_mask=mask, use_cache=False).logits
        alone = model(tokens[1:, 7:], use_cache=False).logits
        torch.testing.assert_close(padded[1:, 7:], alone, rtol=1e-4, atol=1e-5)


@installed
@pytest.mark.parametrize(
    "name", ["GatedDeltaNet2", "PaTHAttention", "DeltaFormerAttention", "RodimusAttention"]
)
def test_layers_are_causal(name: str, accelerated: Any) -> None:
    import fla.layers

    layer_class = getattr(fla.layers, name)
    options = {"num_heads": 4, "head_dim": 16}
    known = inspect.signature(layer_class).parameters
    torch.manual_seed(0)
    layer = layer_class(hidden_size=64, layer_idx=0, **{n: y for n, y in options.items() if n in known})
    x = torch.randn(2, 70, 64)
    layer(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0][:, :40], layer(x[:, :40])[0], rtol=1e-5, atol=1e-5)


@installed
def test_a_missing_rule_says_so(accelerated: Any) -> None:
    import fla.layers

    with pytest.raises(UnsupportedError, match="chunk_mesa_net does not run on a CPU"):
        fla.layers.MesaNet(hidden_size=64, num_heads=4, layer_idx=0)(torch.randn(1, 70, 64))
