"""Evaluation: each document by itself, whatever it is packed with; and what counting achieves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from intarsia.data import load_tokenizer
from intarsia.errors import ConfigError, DataError
from intarsia.model import InferenceModel, LanguageModel
from intarsia.training import Evaluation, NGrams, evaluate
from intarsia.training.evaluate import first_documents


@pytest.fixture
def model(model_config):
    model = LanguageModel(model_config)
    model.init_weights(0)
    return model


def alone(model, split, index, length):
    """The likelihood of a document, a piece at a time, from the logits."""
    total = 0.0
    inputs, targets = (
        torch.tensor(part.astype(np.int64)) for part in (split.document(index), split.targets(index))
    )
    for start in range(0, len(inputs), length):
        logits = model(inputs[None, start : start + length]).logits[0]
        total += torch.nn.functional.cross_entropy(
            logits, targets[start : start + length], reduction="sum"
        ).item()
    return total


@pytest.mark.parametrize(("length", "batch_tokens"), [(100, 8192), (100, 1), (64, 500), (10_000, 64)])
def test_each_document_counts_for_itself(model, dataset, length, batch_tokens):
    split = dataset.heldout
    result = evaluate(model, split, length=length, batch_tokens=batch_tokens)
    with torch.no_grad():
        expected = [alone(model.eval(), split, index, length) for index in range(split.documents)]
    np.testing.assert_allclose(result.nll, expected, rtol=1e-5)
    assert result.nll.dtype == np.float64
    np.testing.assert_array_equal(result.tokens, split.lengths)
    np.testing.assert_array_equal(result.text_bytes, split.text_bytes)


def test_a_model_for_inference(model, dataset):
    expected = evaluate(model, dataset.heldout, length=64)
    found = evaluate(InferenceModel(model, "float32"), dataset.heldout, length=64)
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-5)


def test_it_is_the_same_each_time_and_leaves_the_model_as_it_was(model, dataset):
    model.train()
    first, second = (evaluate(model, dataset.heldout, length=64) for _ in range(2))
    np.testing.assert_array_equal(first.nll, second.nll)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bits_per_byte(model, dataset):
    result = Evaluation(
        np.arange(2), np.array([math.log(2), 3 * math.log(2)]), np.array([2, 2]), np.array([1, 3])
    )
    assert result.bits_per_byte == pytest.approx(1.0)
    assert result.nll_per_token == pytest.approx(math.log(2))
    untrained = evaluate(model, dataset.heldout, length=64)
    # A byte is a token here, and an untrained model knows nothing.
    assert untrained.nll_per_token == pytest.approx(math.log(dataset.vocab_size), rel=0.05)


def test_chosen_documents_in_the_order_that_was_asked_for(model, dataset):
    everything = evaluate(model, dataset.heldout, length=64)
    some = evaluate(model, dataset.heldout, length=64, documents=[2, 0])
    np.testing.assert_allclose(some.nll, everything.nll[[2, 0]], rtol=1e-5)
    np.testing.assert_array_equal(some.documents, [2, 0])


def test_the_beginnings_of_documents(model, dataset):
    split = dataset.heldout
    tokenizer = load_tokenizer(dataset.directory / "tokenizer")
    result = evaluate(model, split, length=64, tokens_per_document=30, tokenizer=tokenizer)
    # Thirty targets are thirty bytes: no document is shorter.
    np.testing.assert_array_equal(result.tokens, 30)
    np.testing.assert_array_equal(result.text_bytes, 30)
    with torch.no_grad():
        tokens, targets = (
            torch.tensor(part[:30].astype(np.int64)) for part in (split.document(1), split.targets(1))
        )
        expected = model.eval()(tokens[None], targets=targets[None]).nll.sum().item()
    assert result.nll[1] == pytest.approx(expected, rel=1e-5)
    whole = evaluate(model, split, length=64, tokens_per_document=10**9)
    np.testing.assert_array_equal(whole.text_bytes, split.text_bytes)


def test_losses_by_position(model, dataset):
    split, length = dataset.heldout, 24
    result = evaluate(model, split, length=length)
    expected = np.zeros((2, 6))
    with torch.no_grad():
        for index in range(split.documents):
            for start in range(0, int(split.lengths[index]), length):
                tokens, targets = (
                    torch.tensor(part[start : start + length].astype(np.int64))[None]
                    for part in (split.document(index), split.targets(index))
                )
                nll = model.eval()(tokens, targets=targets).nll[0].double().numpy()
                for position, value in enumerate(nll):
                    octave = 0 if position == 0 else int(math.log2(position)) + 1
                    expected[:, octave] += value, 1
    np.testing.assert_allclose(result.position_nll, expected[0], rtol=1e-5)
    np.testing.assert_array_equal(result.position_tokens, expected[1])
    assert result.position_nll.sum() == pytest.approx(result.nll.sum())


def test_first_documents(dataset):
    split = dataset.heldout
    sizes = np.cumsum(split.text_bytes)
    assert first_documents(split) == range(split.documents)
    assert first_documents(split, 2) == range(2)
    assert first_documents(split, 10**6) == range(split.documents)
    assert first_documents(split, None, int(sizes[1])) == range(2)
    assert first_documents(split, None, int(sizes[1]) - 1) == range(1)
    assert first_documents(split, None, 1) == range(1)


def test_wrong_arguments(model, dataset):
    with pytest.raises(ConfigError, match="length must be at least 1"):
        evaluate(model, dataset.heldout, length=0)
    with pytest.raises(ConfigError, match="needs the tokenizer"):
        evaluate(model, dataset.heldout, length=64, tokens_per_document=5)
    with pytest.raises(DataError, match="no documents"):
        evaluate(model, dataset.heldout, length=64, documents=[])
    with pytest.raises(DataError, match="and no 1000"):
        evaluate(model, dataset.heldout, length=64, documents=[0, 1000])
    with pytest.raises(DataError, match="and no -1"):
        evaluate(model, dataset.heldout, length=64, documents=[-1])


def test_saved_and_loaded(model, dataset, tmp_path):
    result = evaluate(model, dataset.heldout, length=64)
    result.save(tmp_path / "evaluation.npz")
    loaded = Evaluation.load(tmp_path / "evaluation.npz")
    np.testing.assert_array_equal(loaded.nll, result.nll)
    assert loaded.bits_per_byte == result.bits_per_byte
    (tmp_path / "evaluation.npz").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match="cannot read the evaluation"):
        Evaluation.load(tmp_path / "evaluation.npz")


def test_ngrams_against_their_formulas(dataset):
    train, heldout = dataset.train, dataset.heldout
    V = dataset.vocab_size
    pairs = np.zeros((V, V))
    for index in range(train.documents):
        np.add.at(pairs, (train.document(index), train.targets(index)), 1)
    unigram = (pairs.sum(0) + 1) / (pairs.sum() + V)
    distinct = (pairs > 0).sum(1, keepdims=True)
    seen = pairs.sum(1, keepdims=True)
    bigram = np.where(seen > 0, (pairs + distinct * unigram) / np.maximum(seen + distinct, 1), unigram)
    np.testing.assert_allclose(bigram.sum(1), 1)

    ngrams = NGrams.count(train)
    for model, p in ((ngrams.unigram, np.tile(unigram, (V, 1))), (ngrams.bigram, bigram)):
        result = model(heldout, documents=[1, 0])
        for place, index in enumerate([1, 0]):
            expected = -np.log(p[heldout.document(index), heldout.targets(index)]).sum()
            assert result.nll[place] == pytest.approx(expected)
    assert ngrams.bigram(heldout).bits_per_byte < ngrams.unigram(heldout).bits_per_byte


def test_counting_in_blocks_is_counting(dataset, monkeypatch):
    whole = NGrams.count(dataset.train)
    monkeypatch.setattr("intarsia.training.baselines._BLOCK", 777)
    blocks = NGrams.count(dataset.train)
    np.testing.assert_array_equal(blocks.counts, whole.counts)
    np.testing.assert_array_equal(blocks.pairs, whole.pairs)
    np.testing.assert_array_equal(blocks.pair_counts, whole.pair_counts)
