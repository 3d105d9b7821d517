"""The plans of `examples/studies`: each loads, every arm can be built and matched, and reads what the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest

from intarsia.ladder import load_plan
from intarsia.ladder.arms import resolve
from intarsia.model.language_model import cost_of

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "examples" / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_each_loads_and_its_arms_are_of_one_size(path: Path) -> None:
    plan, quick, full = (load_plan(path, **size) for size in ({}, {"quick": True}, {"full": True}))
    assert (plan.name, quick.name, full.name) == (path.stem, f"{path.stem}-quick", f"{path.stem}-full")
    assert [arm.name for arm in plan.arms] == [arm.name for arm in full.arms]
    for size in (plan, full):
        assert len(size.seeds) >= 3
        costs = [cost_of(arm.config) for arm in resolve(size, 1024)]
        assert len(costs) == len(size.arms)
        sizes = [cost.parameters for cost in costs]
        assert max(sizes) < 1.03 * min(sizes)


@pytest.mark.parametrize("full", [False, True], ids=["laptop", "full"])
def test_sparse_layers_on_one_backbone_read_an_eighth(full: bool) -> None:
    plan = load_plan(ROOT / "examples" / "studies" / "sparse_on_kda.toml", full=full)
    arms = {arm.name: arm.config for arm in resolve(plan, 1024)}
    assert {config.layers[:3] for config in arms.values()} == {("kda", "kda", "kda")}
    length = plan.training["length"]
    assert arms.pop("nsa").mixers["nsa"].selected == length // 8  # beside compressed tokens and a window
    for name, config in arms.items():
        mixer = config.mixers[config.layers[3]].build(config.d_model)
        reads = {
            entry.reads
            for kind, entry in getattr(mixer.memory, "growing", {}).items()
            if kind in ("keys", "values", "latents")
        }
        if name in ("full", "grouped", "none", "window"):
            assert reads <= {None}, name
        else:
            (read,) = reads
            if name == "moba":  # of which each head reads its own, and all of them the query's own block
                read = mixer.most_read
            assert length // 8 <= read < length // 8 + 4, name
