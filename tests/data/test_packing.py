"""Packing and loading: every token once, nothing across a border, the same for any number of processes."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.data import Batch, BatchLoader, Corpus, Document, TokenDataset, TokenSplit, prepare
from intarsia.data.byte_tokenizer import ByteTokenizer
from intarsia.data.packing import Packing
from intarsia.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=30)
SEEDS = st.integers(0, 2**70)


class ListCorpus(Corpus):
    """Texts in memory."""

    def __init__(self, texts: list[str], heldout: float = 0.0) -> None:
        super().__init__("list", limit_bytes=None, heldout=heldout)
        self.texts = texts

    def candidates(self):
        for number, text in enumerate(self.texts):
            yield Document(str(number), text, source_bytes=len(text.encode()))

    def fingerprint(self) -> str:
        return str(self.texts)

    def total_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts)

    def limited(self, limit_bytes: int) -> ListCorpus:
        raise NotImplementedError


MakeSplit = Callable[[list[int]], TokenSplit]


@pytest.fixture(scope="module")
def split_of(tmp_path_factory: pytest.TempPathFactory) -> MakeSplit:
    """Prepares a split whose documents have so many inputs, every byte of a document telling which it is."""

    def make(lengths: list[int]) -> TokenSplit:
        texts = [chr(33 + number) * (length - 1) for number, length in enumerate(lengths)]
        return prepare(
            ListCorpus(texts), ByteTokenizer(), tmp_path_factory.mktemp("split"), progress=False
        ).train

    return make


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TokenSplit:
    texts = [
        f"{number}: " + " ".join("é漢x"[number % 3] + str(word) for word in range(7 * number % 41))
        for number in range(60)
    ]
    return prepare(ListCorpus(texts), ByteTokenizer(), tmp_path_factory.mktemp("split"), progress=False).train


@given(LENGTHS, st.integers(1, 200), SEEDS, st.integers(0, 5))
def test_every_token_of_an_epoch_is_packed_once(lengths: list[int], row: int, seed: int, epochs: int) -> None:
    packing = Packing(np.array(lengths), row, seed)
    total = sum(lengths)
    rows = -(-(epochs + 1) * total // row)
    seen: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for number in range(rows):
        segments = list(packing.row(number))
        assert sum(segment.stop - segment.start for segment in segments) == row
        assert all(0 <= segment.start < segment.stop <= lengths[segment.document] for segment in segments)
        for segment in segments:
            seen[segment.epoch, segment.document] += range(segment.start, segment.stop)
        # Within a row the pieces of a document are in order, and only the row's ends cut.
        assert all(segment.start == 0 for segment in segments[1:])
        assert all(segment.stop == lengths[segment.document] for segment in segments[:-1])
    for epoch in range(epochs + 1):
        for document, length in enumerate(lengths):
            assert sorted(seen[epoch, document]) == list(range(length))


@given(LENGTHS, st.integers(1, 60), SEEDS, st.integers(0, 10**6))
def test_any_row_can_be_had_at_once(lengths: list[int], row: int, seed: int, number: int) -> None:
    one = Packing(np.array(lengths), row, seed)
    near = [list(one.row(index)) for index in range(number, number + 5)]
    again = Packing(np.array(lengths), row, seed)
    assert [list(again.row(index)) for index in reversed(range(number, number + 5))] == near[::-1]


def test_order_changes_with_epoch_and_seed_and_is_fixed_for_ever() -> None:
    lengths = np.full(1000, 3)
    rows = {
        (seed, epoch): [
            next(Packing(lengths, 3, seed).row(1000 * epoch + index)).document for index in range(1000)
        ]
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(sorted(order) == list(range(1000)) for order in rows.values())
    assert len({tuple(order) for order in rows.values()}) == 4
    # If this fails, every run that is resumed or repeated with this version sees other data than before.
    assert rows[0, 0][:6] == [755, 909, 80, 916, 245, 857]


def test_a_long_document_does_not_fill_a_batch() -> None:
    packing = Packing(np.array([10_000] + [100] * 300), 100, 0)
    batches = [[next(packing.row(16 * step + row)).document for row in range(16)] for step in range(20)]
    assert max(batch.count(0) for batch in batches) < 12


# --- the loader ---------------------------------------------------------------------------------------


def documents_of(split: TokenSplit) -> list[list[int]]:
    return [tokens.tolist() for tokens in split]


def check_batch(split: TokenSplit, batch: Batch, length: int) -> None:
    """Each sequence is a piece of one document within one row, and the targets are what follows in it."""
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens.shape == batch.targets.shape == (1, batch.seqs.total)
    whole = [[*document, split.separator] for document in documents_of(split)]
    start = 0
    for size in batch.seqs.lengths:
        assert start // length == (start + size - 1) // length
        tokens = batch.tokens[0, start : start + size].tolist()
        targets = batch.targets[0, start : start + size].tolist()
        assert tokens[1:] == targets[:-1]
        piece = [*tokens, targets[-1]]
        assert any(
            document[at : at + size + 1] == piece for document in whole for at in range(len(document) - size)
        )
        start += size


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
    length=st.integers(1, 30),
    rows=st.integers(1, 3),
)
def test_an_epoch_holds_every_token_and_every_byte_once(
    split_of: MakeSplit, lengths: list[int], length: int, rows: int
) -> None:
    split = split_of(lengths)
    if split.tokens < rows * length:
        return
    loader = BatchLoader(split, rows=rows, length=length, seed=3)
    steps = -(-split.tokens // (rows * length))
    batches = [loader.next() for _ in range(steps)]
    for batch in batches:
        check_batch(split, batch, length)
    # A whole number of epochs fits into a whole number of batches after rows * length epochs.
    if rows * length * split.tokens <= 3000:
        loader = BatchLoader(split, rows=rows, length=length, seed=3)
        batches = [loader.next() for _ in range(split.tokens)]
        counts = np.bincount(torch.cat([batch.tokens[0] for batch in batches]).numpy(), minlength=257)
        expected = np.bincount(np.concatenate(list(split)), minlength=257)
        assert (counts == rows * length * expected).all()
        assert sum(batch.text_bytes for batch in batches) == rows * length * split.text_bytes.sum()
        assert loader.epochs == rows * length


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_global_batch(split: TokenSplit, world_size: int) -> None:
    whole = BatchLoader(split, rows=2 * world_size, length=17, seed=5)
    parts = [
        BatchLoader(split, rows=2, length=17, seed=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for _ in range(100):
        batch = whole.next()
        shares = [part.next() for part in parts]
        assert torch.cat([share.tokens for share in shares], 1).equal(batch.tokens)
        assert torch.cat([share.targets for share in shares], 1).equal(batch.targets)
        assert sum((share.seqs.lengths for share in shares), ()) == batch.seqs.lengths
        assert sum(share.text_bytes for share in shares) == batch.text_bytes
        assert {share.digest for share in shares} == {batch.digest}
        assert {share.epoch for share in shares} == {batch.epoch}
    assert batch.epoch > 0


def test_small_batches_are_the_rows_of_a_large_one(split: TokenSplit) -> None:
    """Gradient accumulation sees the same rows."""
    large = BatchLoader(split, rows=6, length=17, seed=5)
    small = BatchLoader(split, rows=2, length=17, seed=5)
    for _ in range(50):
        assert torch.cat([small.next().tokens for _ in range(3)], 1).equal(large.next().tokens)


@given(before=st.integers(0, 60), seed=SEEDS)
def test_resuming_is_going_on(split: TokenSplit, before: int, seed: int) -> None:
    loader = BatchLoader(split, rows=4, length=13, seed=seed)
    for _ in range(before):
        loader.next()
    state = copy.deepcopy(loader.state_dict())
    onward = [loader.next() for _ in range(3)]
    resumed = BatchLoader(split, rows=2, length=13, seed=seed, rank=1, world_size=2)
    resumed.load_state_dict(state)
    again = BatchLoader(split, rows=4, length=13, seed=seed)
    again.load_state_dict(state)
    assert again.step == before
    for batch in onward:
        same, part = again.next(), resumed.next()
        assert same.digest == part.digest == batch.digest
        assert same.tokens.equal(batch.tokens)
        assert same.seqs == batch.seqs
        assert part.tokens.equal(batch.tokens[:, 26:])
    assert again.state_dict() == loader.state_dict()


def test_nothing_depends_on_global_generators(split: TokenSplit) -> None:
    digests = []
    for number in range(2):
        torch.manual_seed(number)
        np.random.seed(number)
        loader = BatchLoader(split, rows=2, length=32, seed=0)
        digests.append([loader.next().digest for _ in range(10)])
        assert torch.initial_seed() == number
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 10
    assert BatchLoader(split, rows=2, length=32, seed=1).next().digest != digests[0][0]


def test_digest_sees_inputs_targets_and_borders_each_alone(tmp_path: Path) -> None:
    """One document in two rows: its fifth token is the last target of the first and the first input of the second."""

    def batches(text: str) -> list[Batch]:
        split = prepare(ListCorpus([text]), ByteTokenizer(), tmp_path, progress=False).train
        loader = BatchLoader(split, rows=1, length=4, seed=0)
        found = [loader.next(), loader.next()]
        return sorted(found, key=lambda batch: int(batch.tokens[0, 0]) != ByteTokenizer().separator)

    (first, second), (other_first, other_second) = batches("abcdefg"), batches("abcXefg")
    assert torch.equal(first.tokens, other_first.tokens)
    assert not torch.equal(first.targets, other_first.targets)
    assert first.digest != other_first.digest
    assert torch.equal(second.targets, other_second.targets)
    assert not torch.equal(second.tokens, other_second.tokens)
    assert second.digest != other_second.digest
    assert first.digest != second.digest
    assert [batch.digest for batch in batches("abcdefg")] == [first.digest, second.digest]


def test_digest_sees_the_borders(split_of: MakeSplit) -> None:
    one = BatchLoader(split_of([8]), rows=1, length=4, seed=0).next()
    assert one.digest == BatchLoader(split_of([8]), rows=1, length=4, seed=0).next().digest
    assert one.digest != BatchLoader(split_of([8]), rows=2, length=2, seed=0).next().digest


def test_the_state_must_fit(split: TokenSplit, split_of: MakeSplit) -> None:
    state = BatchLoader(split, rows=2, length=8, seed=0).state_dict()
    for other, message in [
        (BatchLoader(split, rows=4, length=8, seed=0), "global_rows was 2 and is 4"),
        (BatchLoader(split, rows=2, length=9, seed=0), "length was 8 and is 9"),
        (BatchLoader(split, rows=2, length=8, seed=1), "seed was 0 and is 1"),
        (BatchLoader(split_of([30, 30]), rows=2, length=8, seed=0), "the data have changed"),
    ]:
        with pytest.raises(DataError, match=message):
            other.load_state_dict(state)
    loader = BatchLoader(split, rows=2, length=8, seed=0)
    with pytest.raises(DataError, match="no state of a batch loader"):
        loader.load_state_dict({"step": 3})
    with pytest.raises(DataError, match="no state of a batch loader"):
        loader.load_state_dict({name: value for name, value in state.items() if name != "step"})
    with pytest.raises(DataError, match="no state of a batch loader: its step is -1"):
        loader.load_state_dict({**state, "step": -1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, not 0"),
        ({"length": 0}, "length must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"rank": 1}, "rank must be at least 0 and below world_size=1, not 1"),
        ({"rank": -1}, "rank must be at least 0"),
    ],
)
def test_wrong_arguments(split: TokenSplit, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchLoader(split, **{"rows": 2, "length": 8, "seed": 0, **changes})


def test_less_text_than_a_batch(split: TokenSplit) -> None:
    with pytest.raises(DataError, match="fewer than one batch of 64 rows of 1000"):
        BatchLoader(split, rows=32, length=1000, seed=0, rank=0, world_size=2)


def test_documents_of_a_split(tmp_path: Path) -> None:
    texts = [f"text {number} é" for number in range(30)]
    dataset = prepare(ListCorpus(texts, heldout=0.3), ByteTokenizer(), tmp_path, progress=False)
    assert isinstance(dataset, TokenDataset)
    found = []
    for split in (dataset.train, dataset.heldout):
        assert len(split) == split.documents > 0
        assert split.tokens == sum(len(tokens) for tokens in split) == split.lengths.sum()
        for index, tokens in enumerate(split):
            assert tokens[0] == split.separator == 256
            assert split.targets(index).tolist() == [*tokens[1:].tolist(), 256]
            found.append(bytes(tokens[1:].tolist()).decode())
            assert split.text_bytes[index] == len(tokens) - 1
        assert split.document(-1).tolist() == tokens.tolist()
        for wrong in (split.documents, -split.documents - 1):
            with pytest.raises(IndexError):
                split.document(wrong)
    assert sorted(found) == sorted(texts)


def test_epochs_have_orders_of_their_own() -> None:
    """The same documents, in another order each time."""
    packing = Packing(np.full(40, 7), row_length=7, seed=0)
    orders = [
        [segment.document for row in range(40 * epoch, 40 * epoch + 40) for segment in packing.row(row)]
        for epoch in range(3)
    ]
    documents = [packing._epoch(epoch).documents.tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(40)) for order in (*orders, *documents))
    assert len({tuple(order) for order in documents}) == 3
