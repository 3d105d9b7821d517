"""What pools share and do not copy: rows of forks, page tables, and a step's books."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import ConfigError, PoolError
from intarsia.layers.growing import PagedPool
from intarsia.layers.joint import JointPool
from intarsia.layers.recurrent import RecurrentPool
from intarsia.layers.rows import Rows
from intarsia.mixers import Mixer
from intarsia.ops import InSlots, Sequences, native
from support.device import device
from support.mixer_cases import CASES, D_MODEL, build
from support.small_models import build as build_model

every_mixer = pytest.mark.parametrize("case", CASES)
RECURRENT = [case for case in CASES if build(case).init_state(1).kind == "recurrent"]
GATHERS = ("learned-decay",)
"""Those that do not say that they go on."""
needs_kernels = pytest.mark.skipif(
    native.missing_reason() is not None, reason="the native kernels are not there"
)


def inputs(T: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, T, D_MODEL, generator=generator, dtype=torch.float64).to(device(), dtype)


@every_mixer
@torch.no_grad()
def test_forks_go_on_together_and_sequences_go_back(case: str) -> None:
    """Each is what it would be as a value: forks that share all, some, nothing; one that was rolled back, twice."""
    mixer = build(case)
    pool, values, seed = mixer.new_pool(6, 2000), {}, iter(range(1000))

    def go_on(**lengths: int) -> None:
        slots = {int(name[1:]): n for name, n in lengths.items()}
        x = inputs(sum(slots.values()), next(seed))
        y, _ = mixer(x, pool.view(list(slots)), Sequences(tuple(slots.values())))
        parts = list(
            zip(slots, x.split(list(slots.values()), 1), y.split(list(slots.values()), 1), strict=True)
        )
        for slot, part, got in parts:
            if part.shape[1]:
                expected, values[slot] = mixer(part, values[slot])
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        for slot, value in values.items():
            for name, tensor in pool.view([slot]).tensors().items():
                torch.testing.assert_close(tensor, value.tensors()[name], rtol=1e-9, atol=1e-9)
        pool.books.rows.check_integrity()

    def fork(source: int) -> int:
        target = pool.fork(source)
        values[target] = values[source]
        return target

    values[pool.take(2)] = mixer.init_state(1)
    go_on(s2=20)
    for _ in range(3):
        fork(2)
    assert sorted(values) == [0, 1, 2, 3]
    go_on(s1=1)  # leaves the others
    go_on(s0=1, s2=2, s3=1)  # all that are left go on, one of them where it is
    snapshot = fork(1)
    kept = values[1]
    go_on(s1=4, s2=1)
    pool.roll_back(1, snapshot)
    values[1] = kept
    del values[snapshot]
    assert pool.free_slots == (4, 5)
    go_on(s1=40, s0=1)
    snapshot, again = fork(1), fork(1)
    kept = values[1]
    go_on(s1=3)
    go_on(s1=1)
    pool.roll_back(1, snapshot)
    values[1] = kept
    del values[snapshot]
    go_on(s1=2)
    pool.roll_back(1, again)
    values[1] = kept
    del values[again]
    go_on(s1=1, s3=0, s2=1)
    with pytest.raises(ConfigError, match="cannot go back to itself"):
        pool.roll_back(1, 1)
    with pytest.raises(ConfigError, match="slot 5 holds no sequence"):
        pool.roll_back(1, 5)
    assert pool.tokens([1])[0] == values[1].tokens[0]
    for slot in list(values):
        pool.free(slot)
    pool.books.rows.check_integrity()
    assert pool.free_slots == (0, 1, 2, 3, 4, 5)


@every_mixer
@torch.no_grad()
def test_a_fork_copies_nothing_but_a_page(case: str) -> None:
    mixer = build(case)
    pool = mixer.new_pool(3, 200)
    first = pool.take()
    mixer(inputs(20), pool.view([first]))
    with Allocations() as before:
        second = pool.fork(first)
        pool.roll_back(first, second)
    assert sum(before) <= 2048, before  # tensors of indices
    second = pool.fork(first)
    before_ = {name: x.clone() for name, x in pool.view([first]).tensors().items()}
    mixer(inputs(1, seed=1), pool.view([second]))
    for name, x in pool.view([first]).tensors().items():
        assert torch.equal(x, before_[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case not in RECURRENT])
@torch.no_grad()
def test_what_stands_in_free_places_is_not_looked_at(case: str, dtype: torch.dtype) -> None:
    """A pool's memory holds whatever was there before it was the pool's."""
    mixer = build(case, dtype)
    pool, other = mixer.new_pool(3, 600), mixer.new_pool(3, 600)
    slots = [pool.take() for _ in range(3)]
    assert [other.take() for _ in range(3)] == slots
    for each, filling in ((pool, 0.0), (other, float("nan"))):
        paged = each.parts[0] if isinstance(each, JointPool) else each
        assert isinstance(paged, PagedPool)
        for pages in paged.pages.values():
            pages.fill_(filling)
    for number, lengths in enumerate([(0, 3, 1), (5, 1, 70), (1, 1, 1), (2, 40, 1), (1, 1, 1)]):
        x = inputs(sum(lengths), number, dtype)
        expected, got = (mixer(x, each.view(slots), Sequences(lengths))[0] for each in (pool, other))
        assert torch.equal(got, expected)
    for name, tensor in pool.view(slots).tensors().items():
        assert torch.equal(other.view(slots).tensors()[name], tensor)


LARGE = {
    "kda": {"num_heads": 2, "head_dim": 128, "head_v_dim": 128},
    "gdn": {"num_heads": 2, "head_dim": 128, "num_v_heads": 2, "head_v_dim": 128},
    "deltanet": {"num_heads": 2, "head_dim": 128, "head_v_dim": 128},
    "deltaproduct": {"num_heads": 2, "head_dim": 128, "head_v_dim": 128},
    "mamba2": {"num_heads": 4, "head_dim": 64, "state_dim": 128},
    "lightning": {"num_heads": 2, "head_dim": 128, "head_v_dim": 128},
    "retnet": {"num_heads": 2, "head_dim": 128, "head_v_dim": 128},
    "gla": {"num_heads": 2, "head_dim": 128, "head_v_dim": 128},
    "hgrn2": {"num_heads": 2, "head_dim": 128, "head_v_dim": 128},
    "linear": {"num_heads": 2, "head_dim": 128, "head_v_dim": 128},
    "rwkv7": {"num_heads": 2, "head_dim": 128, "head_v_dim": 128},
    "comba": {"num_heads": 2, "head_dim": 128, "num_v_heads": 2, "head_v_dim": 128},
    "gated deltanet 2": {"num_heads": 2, "head_dim": 128, "head_v_dim": 128},
    "performer": {"num_heads": 2, "head_dim": 128, "head_v_dim": 128, "num_features": 128},
}


@needs_kernels
@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("lengths", [(1,) * 8, (1, 3, 0, 1, 2, 1, 1, 1)], ids=["one", "few"])
@torch.no_grad()
def test_decoding_in_a_pool_copies_no_states(case: str, lengths: tuple[int, ...]) -> None:
    """All that is allocated together is less than the states of the batch; as values they are copied."""
    mixer = dataclasses.replace(CASES[case], **LARGE[case]).build(D_MODEL)
    pool = mixer.new_pool(9)
    slots = [3, 0, 8, 5, 1, 7, 2, 6]
    for slot in slots:
        pool.take(slot)
    of_batch = mixer.init_state(len(slots)).nbytes()
    x = inputs(sum(lengths), dtype=torch.float32)
    mixer(x, pool.view(slots), Sequences(lengths))
    for layer in (mixer, mixer.for_inference()):
        view, seqs = pool.view(slots), Sequences(lengths)
        with Allocations() as in_pool:
            layer(x, view, seqs)
        value = pool.view(slots).snapshot()
        with Allocations() as as_value:
            layer(x, value, seqs)
        assert max(in_pool) < of_batch / 8
        assert sum(in_pool) < of_batch
        assert max(as_value) >= of_batch / 2


@needs_kernels
@pytest.mark.parametrize("case", [case for case in RECURRENT if not case.startswith(GATHERS)])
@torch.no_grad()
def test_boards_are_not_gathered(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = build(case, torch.float32)
    pool = mixer.new_pool(4)
    slots = [pool.take(slot) for slot in (3, 0, 1)]
    gathered: list[int] = []
    plain = InSlots.gathered

    def counted(self: InSlots) -> Tensor:
        gathered.append(self.room.dim())
        return plain(self)

    monkeypatch.setattr(InSlots, "gathered", counted)
    for lengths in ((1, 1, 1), (2, 0, 3)):
        mixer(inputs(sum(lengths), dtype=torch.float32), pool.view(slots), Sequences(lengths))
    # The last token of RWKV-7 is looked at, as any token is.
    assert gathered == ([3, 3] if case in ("rwkv7", "channel-mix") else [])


class Allocations:
    """The sizes in bytes of what PyTorch allocates meanwhile on the CPU."""

    def __enter__(self) -> list[int]:
        self._found: list[int] = []
        self._profile = torch.profiler.profile(profile_memory=True)
        self._profile.__enter__()
        return self._found

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        self._found += [
            event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0
        ]


programs = st.lists(
    st.tuples(st.sampled_from(["take", "free", "fork", "step"]), st.integers(0, 255)), max_size=40
)


@settings(max_examples=200)
@given(program=programs)
def test_rows_keep_what_sequences_remember(program: list[tuple[str, int]]) -> None:
    """Rows of a list stand for the tensors: each sequence finds the history that is its own."""
    slots, rows = 4, Rows(4)
    content: list[tuple[int, ...]] = [()] * slots
    wanted: dict[int, tuple[int, ...]] = {}
    for number, (action, n) in enumerate(program):
        taken, free = sorted(wanted), sorted(set(range(slots)) - wanted.keys())
        if action == "take" and free:
            slot = free[n % len(free)]
            content[rows.take(slot)], wanted[slot] = (), ()
        elif action == "free" and taken:
            slot = taken[n % len(taken)]
            rows.release(slot)
            del wanted[slot]
        elif action == "fork" and taken and free:
            source, target = taken[n % len(taken)], free[n // 16 % len(free)]
            rows.share(source, target)
            wanted[target] = wanted[source]
        elif action == "step" and taken:
            batch = taken if n & 1 else taken[::-1]
            lengths = [n >> (1 + slot) & 1 for slot in batch]
            read, write, copies = rows.step(batch, lengths)
            for source, target in copies:
                content[target] = content[source]
            found = [content[row] for row in read]
            active = [i for i, length in enumerate(lengths) if length]
            assert len({write[i] for i in active}) == len(active)
            assert all(write[i] != read[j] for i in active for j in active if i != j)
            for i in active:
                content[write[i]] = (*found[i], number)
                wanted[batch[i]] = (*wanted[batch[i]], number)
        rows.check_integrity()
        for slot, history in wanted.items():
            assert content[rows.of([slot])[0]] == history


@torch.no_grad()
def test_layers_that_keep_the_same_tokens_share_a_page_table() -> None:
    model = build_model("kda attention window attention mla").double()
    pool = model.new_pool(3, 100, page_size=8)
    pagings = [layer.paging for layer in pool.layers if isinstance(layer, PagedPool)]
    assert pagings[0] is pagings[2] is pagings[3]
    assert pagings[1] is not pagings[0]
    assert pagings[0].page_size == 8
    slots = [pool.take(), pool.take()]
    row = torch.arange(60)[None]
    model(row, states=pool.view(slots), seqs=Sequences((55, 5)))
    # Once for the model, not once a layer.
    assert pagings[0].pages - pagings[0].free_pages == 7 + 1
    view = pool.view(slots)
    tables = [
        state.held(name).table
        for state, name in zip(view.layers[1:], ("keys", "keys", "keys", "latents"), strict=True)
    ]
    assert tables[0] is tables[2] is tables[3]
    assert tables[1] is not tables[0]
    sizes = {layer.paging.page_size for layer in pool.layers if isinstance(layer, PagedPool)}
    assert sizes == {8}
    assert pool.nbytes == sum(
        x.nbytes
        for layer in pool.layers
        for x in (
            (layer.room.board, layer.room.conv) if isinstance(layer, RecurrentPool) else layer.pages.values()
        )
    )
    pool.free(slots[0])
    pool.free(slots[1])
    assert all(paging.free_pages == paging.pages for paging in pagings)


@torch.no_grad()
def test_a_step_that_an_error_ended_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("kda attention gla").double()
    pool = model.new_pool(3, 100)
    slot = pool.take()
    row = torch.arange(9)[None]
    model(row, states=pool.view([slot]))
    value, snapshot = pool.view([slot]).snapshot(), pool.fork(slot)
    mixer: Mixer = model.blocks[2].mixer
    with monkeypatch.context() as patch:
        patch.setattr(mixer.o_proj, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(row, states=pool.view([slot]))
        patch.setattr(model.blocks[1].mixer.o_proj, "forward", lambda x: 1 / 0)
        pool.roll_back(slot, snapshot)
        snapshot = pool.fork(slot)
        with pytest.raises(ZeroDivisionError):
            model(row, states=pool.view([slot]))
    with pytest.raises(ConfigError, match="ended before it had gone through all layers"):
        model(row, states=pool.view([slot]))
    pool.roll_back(slot, snapshot)
    again = model(row, states=pool.view([slot]))
    assert torch.equal(again.logits, model(row, states=value).logits)


@torch.no_grad()
def test_what_belongs_to_all_layers_is_not_done_in_one() -> None:
    model = build_model("kda gla").double()
    pool = model.new_pool(2)
    slot = pool.take()
    assert pool.layers[0].tokens([slot]) == (0,)
    with pytest.raises(ConfigError, match="in the model's pool"):
        pool.layers[0].evict([slot])
    with pytest.raises(ConfigError, match="in the model's pool"):
        pool.layers[0].restore(model.init_states(1).layers[0])
    with pytest.raises(ConfigError, match="needs a slot at least"):
        model.new_pool(0)
    full = build_model("kda attention").double()
    small = full.new_pool(1, 16)
    states = small.view([small.take()])
    with pytest.raises(PoolError, match="the pool is full"):
        full(torch.zeros(1, 40, dtype=torch.int64), states=states)


def test_what_has_gone_on_waits_for_no_garbage_collector() -> None:
    """A batch has a page table: behind a long text those of many tokens would be more than the states."""
    model = build_model("kda attention")
    gone = []
    gc.disable()
    try:
        with torch.inference_mode():
            pool = model.new_pool(1, 64)
            states = pool.view([pool.take()])
            for _ in range(3):
                gone.append(weakref.ref(states.layers[0].shared))
                states = model(torch.zeros(1, 3, dtype=torch.int64), states=states).states
    finally:
        gc.enable()
    assert [batch() for batch in gone] == [None] * 3
