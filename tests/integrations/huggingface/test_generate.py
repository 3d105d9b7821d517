"""`generate` of transformers over states: beams, batches, drafts and what is dropped of them."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.15")
from intarsia.errors import ShapeError, UnsupportedError
from intarsia.inference import generate
from intarsia.inference.sampling import Sampling
from intarsia.integrations.huggingface import IntarsiaCache
from support.seats import HYBRID, PAD, padded, seat
from support.small_models import tokens_of

ROWS = [tokens_of(9, 1), tokens_of(4, 2), tokens_of(14, 3)]
EXACT = {"rtol": 1e-9, "atol": 1e-10}
GREEDY = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def model():
    return seat(HYBRID)


def test_greedy_decoding_is_that_of_our_own_generate(model):
    ids, mask = padded(ROWS, "left")
    out = model.generate(ids, attention_mask=mask, **GREEDY)
    for n, row in enumerate(ROWS):
        assert out[n, 14:].tolist() == list(
            generate(model.model, row, max_tokens=12, sampling=Sampling(temperature=0))
        )


def test_rows_that_have_ended_go_on_as_padding(model):
    ids, mask = padded(ROWS, "left")
    out = model.generate(ids, attention_mask=mask, **GREEDY)
    end = out[0, 17].item()
    ended = model.generate(ids, attention_mask=mask, eos_token_id=end, **GREEDY)
    for n in range(3):
        expected = out[n].tolist()
        if end in expected[14:]:
            stop = expected.index(end, 14) + 1
            expected = expected[:stop] + [PAD] * (len(expected) - stop)
        assert ended[n].tolist() == expected[: ended.shape[1]]


def test_sampling_is_of_the_models_distribution(model):
    ids = torch.tensor([ROWS[0]])
    options = {"do_sample": True, "pad_token_id": PAD, "max_new_tokens": 8, "top_k": 0}
    torch.manual_seed(0)
    cached = model.generate(ids, num_return_sequences=3, **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, num_return_sequences=3, use_cache=False, **options), cached)
    assert len({tuple(row) for row in cached.tolist()}) == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_beam_search_reorders_the_states(model, side):
    """As it is without a cache, where there is nothing to reorder."""
    ids, mask = padded(ROWS, side)
    options = {**GREEDY, "num_beams": 4, "attention_mask": mask, "num_return_sequences": 2}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_a_chat_goes_on_from_the_cache(model):
    ids, mask = padded(ROWS, "left")
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    cache = first.past_key_values
    assert cache.get_seq_length() == first.sequences.shape[1] - 1  # the last token has not been read
    longer = torch.cat([first.sequences, torch.tensor([[1, 2], [3, 4], [5, 6]])], 1)
    seen = torch.cat([mask, torch.ones(3, longer.shape[1] - 14, dtype=torch.int64)], 1)
    expected = model.generate(longer, attention_mask=seen, **GREEDY)
    for again in (copy.deepcopy(cache), cache):  # one prefix, continued twice
        out = model.generate(longer, attention_mask=seen, past_key_values=again, **GREEDY)
        assert torch.equal(out, expected)


def test_batches_are_split_selected_and_repeated(model):
    ids, mask = padded(ROWS, "left")
    following, more = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.ones(3, 2, dtype=torch.int64)
    with torch.no_grad():
        start = model(ids, attention_mask=mask).past_key_values

        def on(cache, rows):
            seen = torch.cat([mask, more], 1)[rows]
            return model(following[rows], attention_mask=seen, past_key_values=cache).logits

        expected = on(copy.deepcopy(start), [0, 1, 2])
        changes = {
            (2, 0): lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
            (0, 2): lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
            (0, 0, 1, 1, 2, 2): lambda cache: cache.batch_repeat_interleave(2),
            (1, 1, 0): lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])),
        }
        for rows, change in changes.items():
            cache = copy.deepcopy(start)
            change(cache)
            assert cache.batch_size == len(rows)
            torch.testing.assert_close(on(cache, list(rows)), expected[list(rows)], **EXACT)
    start.reset()
    assert start.get_seq_length() == 0
    assert start.batch_size == -1


REPEATING = torch.tensor([tokens_of(7, 5) * 4 + tokens_of(3, 5)])


@pytest.mark.parametrize("layout", [HYBRID, "attention", "window", "kda"])
def test_drafts_from_the_prompt_change_nothing(layout, monkeypatch):
    model = seat(layout)
    dropped = []
    crop = IntarsiaCache.crop
    monkeypatch.setattr(IntarsiaCache, "crop", lambda cache, n: (dropped.append(-n), crop(cache, n))[1])
    options = {**GREEDY, "max_new_tokens": 30}
    expected = model.generate(REPEATING, **options)
    assert not dropped
    assert torch.equal(model.generate(REPEATING, prompt_lookup_num_tokens=4, **options), expected)
    assert max(dropped) > 0


@pytest.mark.parametrize("of_the_same_mind", [False, True])
def test_an_assistant_changes_nothing(model, of_the_same_mind):
    assistant = seat(HYBRID) if of_the_same_mind else seat("kda mla", seed=1)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.num_assistant_tokens = 5
    options = {"do_sample": False, "max_new_tokens": 12}
    expected = model.generate(REPEATING, **options)
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(None))
    out = model.generate(REPEATING, assistant_model=assistant, **options)
    hook.remove()
    assert torch.equal(out, expected)
    # A step is several tokens where the drafts are right.
    assert len(calls) < 6 if of_the_same_mind else len(calls) > 6


def test_after_a_crop_the_cache_is_what_it_was(model):
    ids = torch.tensor([tokens_of(20, 7), tokens_of(20, 8)])
    with torch.no_grad():
        whole = model(ids).logits
        for drop in range(15):
            cache = IntarsiaCache()
            model(ids[:, :6], past_key_values=cache)
            cache.activate_past_recording()
            for piece in (ids[:, 6:7], ids[:, 7:12], ids[:, 12:20]):
                model(piece, past_key_values=cache)
            if drop == 14:
                cache.crop(-3)
                with pytest.raises(UnsupportedError, match="activate_past_recording"):
                    cache.crop(-15)
                assert cache.get_seq_length() == 17
                continue
            cache.crop(-drop)
            kept = 20 - drop
            assert cache.get_seq_length() == kept
            cache.reorder_cache(torch.tensor([1, 0]))
            for start in (kept, kept + 1):
                piece = ids[[1, 0], start : start + 1] if start == kept else ids[[1, 0], start:]
                if piece.shape[1]:
                    logits = model(piece, past_key_values=cache).logits
                    torch.testing.assert_close(
                        logits[[1, 0]], whole[:, start : start + piece.shape[1]], **EXACT
                    )


def test_what_keeps_its_tokens_drops_them_without_being_told():
    model = seat("attention mla-rotated")
    ids, mask = padded(ROWS, "right")
    with torch.no_grad():
        cache = model(ids, attention_mask=mask).past_key_values
        cache.crop(-6)  # of the first row one token, of the second none
        assert cache.past.states.tokens == (8, 4, 8)
        following = torch.tensor([[1], [2], [3]])
        seen = torch.cat([mask[:, :8], torch.ones(3, 1, dtype=torch.int64)], 1)
        logits = model(following, attention_mask=seen, past_key_values=cache).logits[:, 0]
        for n, row in enumerate(ROWS):
            expected = model.model(torch.tensor([[*row[:8], n + 1]])).logits[0, -1]
            torch.testing.assert_close(logits[n], expected, **EXACT)
        cache.crop(-1)
        padding = torch.cat([mask[:, :8], torch.tensor([[0], [1], [1]])], 1)
        with pytest.raises(UnsupportedError, match="without padding in front"):
            model(following, attention_mask=padding, past_key_values=cache)
    for wrong in (1, -9):
        with pytest.raises(ShapeError, match="crop takes minus"):
            cache.crop(wrong)
