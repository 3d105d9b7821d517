"""One process of a test of `fully_shard` by hand: `python sharding_worker.py SOURCE CONFIG`.

SOURCE is the example of docs/training.md, which defines `shard_by_hand` and its uses, and CONFIG a model's
configuration in JSON.
Prints what the process found, in JSON.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from intarsia.model import LanguageModel, ModelConfig


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def differences(ours: LanguageModel, theirs: LanguageModel, what: str) -> list[str]:
    """The names of the parameters (or gradients) that are not equal to the last bit."""
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    if what == "grad":
        return [name for (name, a), b in pairs if not torch.equal(whole(a.grad), b.grad)]
    return [name for (name, a), b in pairs if not torch.equal(whole(a.detach()), b.detach())]


def report(example: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    model = LanguageModel(config)
    model.init_weights(0)
    alone = copy.deepcopy(model).to(torch.bfloat16)
    example["bfloat16"](model)
    tokens = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {
        "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
        "float32": sorted(name for name, p in model.named_parameters() if p.dtype == torch.float32),
        "weights": differences(model, alone, "data"),
    }
    losses = []
    for step in range(2):  # the second step sees that the first one's gathered weights were let go
        for m in (model, alone):
            loss = m(tokens[:, :-1], targets=tokens[:, 1:]).nll.mean()
            loss.backward()
            losses.append(loss.item())
        found[f"gradients {step}"] = differences(model, alone, "grad")
        for m in (model, alone):
            torch.optim.SGD(m.parameters(), lr=0.125).step()  # a power of two: one rounding, in any order
            m.zero_grad()
        found[f"weights {step}"] = differences(model, alone, "data")
    found["losses"] = losses
    model.eval()
    with torch.no_grad():
        expected = alone(tokens).logits
        first = model(tokens[:, :30], states=model.init_states(2))
        rest = model(tokens[:, 30:], states=first.states)
        found["decoding"] = float(
            (torch.cat([first.logits, rest.logits], 1) - expected).norm() / expected.norm()
        )
    # The order of large models: meta device, divided, memory, weights.
    with torch.device("meta"):
        empty = LanguageModel(config)
    example["shard_by_hand"](empty)
    empty.to_empty(device="cpu")
    empty.init_weights(0)
    fresh = LanguageModel(config)
    fresh.init_weights(0)
    found["from meta"] = differences(empty, fresh, "data")
    # Float32 weights that are multiplied in bfloat16. The same weights, of which autocast makes the same copies.
    example["bfloat16_with_float32_weights"](fresh)
    loss = fresh(tokens[:, :-1], targets=tokens[:, 1:]).nll.mean()
    loss.backward()
    found["mixed"] = loss.item()
    found["mixed dtypes"] = sorted({str(p.grad.dtype) for p in fresh.parameters()})
    found["mixed gradients"] = all(bool(whole(p.grad).isfinite().all()) for p in fresh.parameters())
    return found


def main() -> None:
    source, config = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    found = report(namespace, ModelConfig.from_dict(json.loads(config)))
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
