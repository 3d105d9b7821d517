"""One of two processes that balance experts together: `python router_bias_worker.py RANK DIRECTORY`.

Reads the configuration and the tokens from `DIRECTORY/work.pt`, computes the loads of its row, updates the
bias and writes the biases to `DIRECTORY/RANK.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from intarsia.model import LanguageModel, ModelConfig


def biases(model: LanguageModel) -> torch.Tensor:
    return torch.stack([block.feed_forward.router.bias for block in model.blocks[1:]])


if __name__ == "__main__":
    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=2)
    config, tokens = torch.load(directory / "work.pt")
    model = LanguageModel(ModelConfig.from_dict(config))
    model.init_weights(0)
    model.update_router_bias(model(tokens[rank : rank + 1], side=("load",)).side)
    torch.save(biases(model), directory / f"{rank}.pt")
    dist.destroy_process_group()
