"""A comparison on a Ray cluster of two machines, of which one is lost: the numbers are those of one without."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from intarsia.errors import ConfigError
from intarsia.jobs.ray_cluster import RayCluster, ray_cluster
from intarsia.ladder import Plan, compare
from intarsia.ladder.capacity import Capacity
from support.small_corpus import texts

CLOCKS = {"seconds", "environment", "report", "history"}
PLAN: dict[str, Any] = {
    "name": "on-ray",
    "seeds": [1, 2],
    "budget": {"steps": 60},
    "corpus": {"tokenizer": "bytes", "heldout": 0.3},
    "training": {"rows": 2, "length": 64, "checkpoint_every": 10, "log_every": 10},
    "tuning": {"learning_rates": [5e-3], "documents": 6},
    "evaluation": {"documents": 12, "tokens_per_document": 100, "resamples": 1000},
    "figures": {"contexts": [], "throughput_steps": 0, "sample_tokens": 0},
    "model": {
        "d_model": 16,
        "depth": 2,
        "mixers": {
            "mla": {"num_heads": 1, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "v_dim": 8},
            "kda": {"num_heads": 1, "head_dim": 8},
        },
        "feed_forward": {"d_hidden": 48},
    },
    "baselines": "none",
    "arms": [
        {"name": "full", "preset": "full-nano"},
        {"name": "hybrid", "preset": "kimi-linear-nano", "model": {"layout": "kda mla"}},
    ],
}


def test_more_threads_than_any_machine_has_are_refused(tmp_path: Path) -> None:
    machines = RayCluster(({"CPU": 2.0, "memory": 8e9},) * 4, False)
    assert Capacity.of(tmp_path, None, 3, machines) == Capacity(3, 2, machines), (
        "a run stays on one machine, so that it has no more than two threads"
    )
    small = RayCluster(({"CPU": 1.0, "memory": 8e9},) * 4, False)
    with pytest.raises(ConfigError, match=r"take 2 threads, as they began, and no machine .* more than 1"):
        Capacity.of(tmp_path, None, 3, small)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two machines with a CPU each, played by this one, beside a head with none."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [made.add_node(num_cpus=1, include_dashboard=False) for _ in range(2)]
        made.wait_for_nodes()
        yield made, nodes
    finally:
        ray.shutdown()
        made.shutdown()


def numbers(found: Any) -> Any:
    """All of verdict.json but clocks and places."""
    if isinstance(found, dict):
        return {key: numbers(value) for key, value in found.items() if key not in CLOCKS}
    return [numbers(value) for value in found] if isinstance(found, list) else found


def run(plan: dict[str, Any], directory: Path, machines: RayCluster | None) -> tuple[Any, str]:
    with (directory.parent / f"{directory.name}.log").open("w+") as file:
        console = Console(file=file, width=160)
        compare(Plan.from_dict(plan), directory, jobs=2, console=console, machines=machines)
        file.seek(0)
        return numbers(json.loads((directory / "verdict.json").read_text())), file.read()


@pytest.mark.slow
def test_one_of_two_machines_is_lost(cluster: Any, tmp_path: Path) -> None:
    made, nodes = cluster
    plan = {**PLAN, "corpus": {**PLAN["corpus"], "source": texts(tmp_path / "texts")}}
    lost: list[int] = []

    def lose_one() -> None:
        """Once two runs have saved something: both machines are at work then."""
        while len(list(tmp_path.glob("there/runs/*/train/checkpoints/step-*"))) < 2:
            time.sleep(0.05)
        lost.append(len(list(tmp_path.glob("there/runs/*/outcome.json"))))
        made.remove_node(nodes[1], allow_graceful=False)

    with ray_cluster(made.address) as machines:
        assert (machines.cores, machines.widest) == (2, 1)
        killer = threading.Thread(target=lose_one, daemon=True)
        killer.start()
        there, printed = run(plan, tmp_path / "there", machines)
        killer.join()
    here, _ = run(plan, tmp_path / "here", None)
    assert lost[0] < 4, "it was lost while there was something to do"
    assert printed.count("was lost") == 1
    assert "it goes on elsewhere" in printed
    assert there == here
    for place in ("here", "there"):
        runs = sorted(path.parent.name for path in tmp_path.glob(f"{place}/runs/*/outcome.json"))
        assert len(runs) == 4
        assert not list(tmp_path.glob(f"{place}/runs/*/failure.json"))
