"""Padding enters no state: a row of a padded batch gives what its tokens give alone, in every mixer."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", minversion="5.15")
from intarsia.errors import ShapeError, UnsupportedError
from intarsia.integrations.huggingface import IntarsiaCache
from support.seats import HYBRID, PAD, SEATED, padded, seat
from support.small_models import tokens_of

ROWS = [tokens_of(9, 1), tokens_of(1, 2), tokens_of(14, 3)]
EXACT = {"rtol": 1e-9, "atol": 1e-10}  # float64: what the order of summation leaves


def alone(model, row):
    """`[T, V]`, of the language model itself."""
    return model.model(torch.tensor([row])).logits[0]


@pytest.mark.parametrize("layout", SEATED)
def test_a_padded_row_is_the_row_alone(layout):
    """In one call, and with a cache that goes on in pieces, of which some are padding alone for a row."""
    model = seat(layout)
    with torch.no_grad():
        expected = [alone(model, row) for row in ROWS]
        for side in ("left", "right"):
            ids, mask = padded(ROWS, side)
            whole = model(ids, attention_mask=mask).logits
            cache, pieces = IntarsiaCache(), []
            for start, end in ((0, 4), (4, 11), (11, 12), (12, 14)):
                out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
                pieces.append(out.logits)
            assert cache.get_seq_length() == 14
            assert cache.past.states.tokens == tuple(map(len, ROWS))
            for logits in (whole, torch.cat(pieces, 1)):
                for n in range(len(ROWS)):
                    torch.testing.assert_close(logits[n, mask[n] == 1], expected[n], **EXACT)
                    # So the last column is what comes next, on whichever side the padding is.
                    torch.testing.assert_close(logits[n, -1], expected[n][-1], **EXACT)


@pytest.mark.parametrize("layout", ["kda", "gdn", "mamba2", "fox-pro", "rwkv7", HYBRID])
def test_a_right_padded_prompt_leaves_the_state_of_its_tokens(layout):
    """Not zeros in the convolution, nor padding in its place; and to go on is to go on behind the tokens."""
    model = seat(layout)
    ids, mask = padded(ROWS, "right")
    with torch.no_grad():
        cache = model(ids, attention_mask=mask).past_key_values
        for n, row in enumerate(ROWS):
            states = model(torch.tensor([row])).past_key_values.past.states
            for ours, theirs in zip(cache.past.states.select([n]).layers, states.layers, strict=True):
                for name, tensor in theirs.tensors().items():
                    torch.testing.assert_close(ours.tensors()[name], tensor, **EXACT)
        following = torch.tensor([[7, 8], [9, 10], [11, 12]])
        more = torch.cat([mask, torch.ones(3, 2, dtype=torch.int64)], 1)
        logits = model(following, attention_mask=more, past_key_values=cache).logits
        for n, row in enumerate(ROWS):
            torch.testing.assert_close(logits[n], alone(model, [*row, *following[n].tolist()])[-2:], **EXACT)


@pytest.mark.parametrize("layout", SEATED)
def test_several_tokens_behind_a_cached_state_are_several(layout):
    model = seat(layout)
    ids = torch.tensor([tokens_of(13, 4), tokens_of(13, 5)])
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :6]).past_key_values
        torch.testing.assert_close(model(ids[:, 6:], past_key_values=cache).logits, whole[:, 6:], **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_read_in_pieces_is_continued_as_alone(side):
    model = seat(HYBRID)
    ids, mask = padded(ROWS, side)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    for chunk in (None, 5):
        out = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **options)
        for n, row in enumerate(ROWS):
            single = model.generate(torch.tensor([row]), **options)
            assert out[n, 14:].tolist() == single[0, len(row) :].tolist()


def test_padding_between_tokens_is_no_token():
    model = seat(HYBRID)
    row, mask = torch.tensor([[1, 2, PAD, PAD, 3, PAD, 4]]), torch.tensor([[1, 1, 0, 0, 1, 0, 1]])
    with torch.no_grad():
        logits = model(row, attention_mask=mask).logits[0]
        expected = alone(model, [1, 2, 3, 4])
    torch.testing.assert_close(logits, expected[[0, 1, 1, 1, 2, 2, 3]], **EXACT)
    assert torch.equal(model(row, attention_mask=torch.zeros_like(mask)).logits, torch.zeros(1, 7, 97))


def test_loss_of_a_padded_batch_is_that_of_its_tokens():
    model = seat(HYBRID)
    expected = [
        -alone(model, row)[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None]) for row in ROWS
    ]
    expected = torch.cat(expected).mean()
    for side in ("left", "right"):
        ids, mask = padded(ROWS, side)
        loss = model(ids, attention_mask=mask, labels=ids).loss
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        padding_is_ignored = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        torch.testing.assert_close(padding_is_ignored, loss)
    ids, mask = padded(ROWS, "left")
    loss = model(ids, attention_mask=mask, labels=ids, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(loss, expected * sum(len(row) - 1 for row in ROWS) / 100, rtol=1e-6, atol=0)


def test_sequences_packed_into_a_row_do_not_meet():
    model = seat(HYBRID)
    row = torch.tensor([[token for row in ROWS for token in row]])
    positions = torch.cat([torch.arange(len(row)) for row in ROWS])[None]
    edges = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
    with torch.no_grad():
        expected = torch.cat([alone(model, row) for row in ROWS])
        for told in ({"position_ids": positions}, {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}):
            logits = model(row, use_cache=False, **told).logits[0]
            torch.testing.assert_close(logits, expected, **EXACT)
        ids, mask = padded(ROWS, "left")
        separate = model(ids, attention_mask=mask, labels=ids).loss
        torch.testing.assert_close(model(row, position_ids=positions, labels=row).loss, separate)
    with pytest.raises(UnsupportedError, match="one sequence a row"):
        model(row, position_ids=positions, use_cache=True)


@pytest.mark.parametrize("positions", [[0, 1, 3, 4], [0, 1, 1, 2], [0, 2, 4, 6]])
def test_positions_that_leave_tokens_out_are_refused(positions):
    with pytest.raises(UnsupportedError, match="go up by one"):
        seat("kda")(torch.tensor([[1, 2, 3, 4]]), position_ids=torch.tensor([positions]))


def test_positions_may_count_the_padding_in_front():
    model = seat("mla-rotated")
    ids, mask = padded(ROWS, "left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        counted = model(ids, attention_mask=mask, use_cache=False, position_ids=torch.arange(14)[None]).logits
    assert torch.equal(counted, expected)


def test_masks_that_cannot_be_are_refused_before_anything_is_read():
    model = seat("kda")
    ids, mask = padded(ROWS, "left")
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    following = torch.ones(3, 2, dtype=torch.int64)
    with pytest.raises(ShapeError, match="the 14 places that the cache has read and the 2 of this call"):
        model(following, attention_mask=following, past_key_values=cache)
    with pytest.raises(ShapeError, match="what is in a state stays in it"):
        model(following, attention_mask=torch.ones(3, 16), past_key_values=cache)
    with pytest.raises(UnsupportedError, match="pairs"):
        model(ids, attention_mask=torch.ones(3, 1, 14, 14))
    with pytest.raises(UnsupportedError, match="go on from what the cache has read"):
        model(following, past_key_values=cache, position_ids=torch.tensor([[14, 15]]))
    with pytest.raises(ShapeError, match="rows"):
        model(following[:2], past_key_values=cache)
    assert cache.get_seq_length() == 14
