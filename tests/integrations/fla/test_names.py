"""Which of flash-linear-attention's names are here, and what the others say."""

from __future__ import annotations

import importlib.util
import inspect

import pytest

from intarsia.errors import UnsupportedError
from intarsia.integrations import fla
from intarsia.integrations.fla.missing import MISSING

# `fla.ops.__all__` of flash-linear-attention 0.6.0.
PUBLIC = [
    "chunk_abc",
    "chunk_comba",
    "chunk_cyfa",
    "chunk_delta_rule",
    "chunk_dplr_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gla",
    "chunk_gsa",
    "chunk_iplr_delta_rule",
    "chunk_kda",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_log_linear_attn",
    "chunk_mesa_net",
    "chunk_momentum_delta_rule",
    "chunk_precond_gated_delta_rule",
    "chunk_precond_kda",
    "chunk_retention",
    "chunk_rwkv6",
    "chunk_rwkv7",
    "chunk_simple_gla",
    "fused_attnres",
    "fused_chunk_based",
    "fused_chunk_delta_rule",
    "fused_chunk_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_recurrent_comba",
    "fused_recurrent_cyfa",
    "fused_recurrent_delta_rule",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gla",
    "fused_recurrent_gsa",
    "fused_recurrent_hgrn",
    "fused_recurrent_iplr_delta_rule",
    "fused_recurrent_kda",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_momentum_delta_rule",
    "fused_recurrent_precond_gated_delta_rule",
    "fused_recurrent_precond_kda",
    "fused_recurrent_retention",
    "fused_recurrent_rwkv6",
    "fused_recurrent_rwkv7",
    "fused_recurrent_simple_gla",
    "parallel_attn",
    "parallel_based",
    "parallel_forgetting_attn",
    "parallel_nsa",
    "parallel_parallax",
    "parallel_path_attn",
    "parallel_retention",
    "parallel_simple_gla",
    "parallel_stickbreaking_attn",
    "parallel_wall_attn",
    "parallel_wall_attn_decode",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_is_served_or_says_what_is_missing(name: str) -> None:
    if name in fla.__all__:
        assert inspect.getdoc(getattr(fla, name))
        return
    with pytest.raises(UnsupportedError, match=f"does not serve {name}: {MISSING[name]}"):
        exec(f"from intarsia.integrations.fla import {name}")


def test_nothing_is_both_served_and_missing() -> None:
    assert not set(MISSING) & set(fla.__all__)
    assert len(set(PUBLIC) & set(fla.__all__)) == 37


def test_another_name_is_no_attribute() -> None:
    assert not hasattr(fla, "chunk_no_such_rule")
    with pytest.raises(AttributeError, match="did you mean 'chunk_kda'"):
        fla.chunk_kdaa  # noqa: B018
    with pytest.raises(ImportError):
        exec("from intarsia.integrations.fla import chunk_no_such_rule")


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed")
def test_the_installed_version_has_no_other_names() -> None:
    import fla.ops as theirs

    assert set(theirs.__all__) <= set(PUBLIC)
