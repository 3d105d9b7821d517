"""Caches of transformers with room hold what those without hold, and copy nothing for a token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers", minversion="5.15")
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, StaticCache

from intarsia.integrations.transformers_cache import with_room
from support.transformers_models import build, tokens

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 90)),
        st.tuples(st.just("crop"), st.integers(1, 5)),
        st.tuples(st.just("reorder"), st.permutations(range(2))),
        st.tuples(st.just("copy"), st.booleans()),
        st.tuples(st.just("repeat"), st.just(2)),
    ),
    max_size=12,
)


def entries(seed: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, length, 4, generator=generator), torch.randn(
        batch, 2, length, 3, generator=generator
    )


@given(STEPS, st.booleans())
def test_layers_hold_the_same(steps: list[tuple[str, Any]], begins_in_inference: bool) -> None:
    ours, theirs = with_room(DynamicCache()), DynamicCache()
    kept: list[tuple[Any, Any]] = []
    returned: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode(begins_in_inference):
        for cache in (ours, theirs):
            cache.update(*entries(0, 2, 3), 0)
    for n, (what, option) in enumerate(steps, 1):
        pair = ours.layers[0], theirs.layers[0]
        if what == "append":
            states = entries(n, pair[1].keys.shape[0], option)
            found = [cache.update(*states, 0) for cache in (ours, theirs)]
            returned += [(a, b.clone()) for a, b in zip(*found, strict=True)]
        elif what == "crop" and pair[1].get_seq_length() > option:
            for layer in pair:
                layer.crop(-option)
        elif what == "reorder":
            order = torch.tensor(option)
            for layer in pair:
                layer.reorder_cache(order)
        elif what == "copy":
            # Both go on, and neither changes the other.
            make = copy.deepcopy if option else copy.copy
            kept.append((pair[0], copy.deepcopy(pair[1])))
            ours.layers[0] = make(pair[0])
            for layer in kept[-1]:
                layer.update(*entries(100 + n, pair[1].keys.shape[0], 2))
        elif what == "repeat" and pair[1].keys.shape[0] < 8:
            for layer in pair:
                layer.batch_repeat_interleave(option)
    for a, b in [*kept, (ours.layers[0], theirs.layers[0])]:
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    assert all(torch.equal(a, b) for a, b in returned)


def test_a_token_moves_nothing() -> None:
    cache = with_room(DynamicCache())
    cache.update(*entries(0, 1, 100), 0)
    keys, _ = cache.update(*entries(1, 1, 1), 0)
    for n in range(20):
        more, _ = cache.update(*entries(n, 1, 1), 0)
        assert more.data_ptr() == keys.data_ptr()
    assert cache.get_seq_length() == 121


def test_only_ordinary_layers_get_room() -> None:
    config = build("qwen3_next").config
    cache = with_room(DynamicCache(config=config))
    assert [type(layer).__name__ for layer in cache.layers] == ["LinearAttentionLayer", "RoomyLayer"]
    config = build("qwen3").config
    assert [type(layer).__name__ for layer in with_room(DynamicCache(config=config)).layers] == [
        "DynamicSlidingWindowLayer", "RoomyLayer",
    ]  # fmt: skip
    static = StaticCache(config=config, max_cache_len=8)
    assert type(with_room(static)) is StaticCache
    assert with_room(None) is None


def test_gradients_go_through_a_cache() -> None:
    cache = with_room(DynamicCache())
    first, second = (tuple(x.requires_grad_() for x in entries(n, 1, 3)) for n in range(2))
    cache.update(*first, 0)
    keys, values = cache.update(*second, 0)
    (keys.sum() + values.sum()).backward()
    assert all(bool((x.grad == 1).all()) for x in (*first, *second))


def test_prepared_models_make_them() -> None:
    from intarsia.integrations.transformers_packed import PreparedModel
    from intarsia.layers.packed import Packing

    model: Any = build("llama")
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with PreparedModel(model, Packing("float32", least=1)):
        made = model.generate(tokens(1, 5), **options).past_key_values
        mine = model.generate(tokens(1, 5), past_key_values=DynamicCache(), **options).past_key_values
    assert {type(layer).__name__ for layer in made.layers} == {"RoomyLayer"}
    assert {type(layer) for layer in mine.layers} == {DynamicLayer}
