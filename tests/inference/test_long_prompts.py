"""Prompts are read in pieces: in bounded memory, told to who asks, and stopped by what is raised then."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from intarsia.inference import GREEDY, generate
from support.small_models import build, tokens_of

CHILD = """
import json, resource, sys
import torch
from intarsia.inference import GREEDY, generate
from intarsia.model import InferenceModel
from intarsia.ops import attention_cpu
from support.small_models import build, tokens_of

layout, length = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(2)
attention_cpu.EXPANDED = 1 << 19  # blocks of keys made of latents are full in the first prompt already
model = InferenceModel(build(layout).to(torch.bfloat16))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
list(generate(model, tokens_of(4096), max_tokens=2, sampling=GREEDY, prefill_chunk=512))
before = peak()
prompt = tokens_of(length)
list(generate(model, prompt, max_tokens=2, sampling=GREEDY, prefill_chunk=512))
print(json.dumps({"grown": peak() - before, "states": model.model.cost().state_bytes(length)}))
"""


def test_how_far_the_reading_is() -> None:
    model, told = build("kda mla"), []
    prompts = [tokens_of(20), tokens_of(7)]
    tokens = list(
        generate(
            model, prompts, max_tokens=4, sampling=GREEDY, prefill_chunk=8,
            on_read=lambda read, total: told.append((read, total)),
        )
    )  # fmt: skip
    assert told == [(15, 27), (23, 27), (27, 27)]
    assert tokens == list(generate(model, prompts, max_tokens=4, sampling=GREEDY, prefill_chunk=8))


def test_what_is_raised_while_it_reads_stops_it() -> None:
    def stop(read: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(generate(build("kda mla"), tokens_of(40), prefill_chunk=8, on_read=stop))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["kda*3 mla", "kda attention", "gdn window"])
def test_memory_does_not_grow_with_the_prompt_beyond_the_states(layout: str) -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, layout, str(48 * 1024)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # A piece's logits of one of 2 heads against 48 k keys would be 100 MB in float32, a mask of them 25 MB.
    assert found["grown"] - found["states"] <= 20 << 20, found


def test_masks_and_logits_of_pytorchs_forms_are_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from intarsia.ops import attention_torch, latent_attention, latent_attention_torch, softmax_attention

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 3, 8, generator=generator, dtype=torch.float64) for n in (5, 60))
    latents, up = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 60, 10), (3, 12, 6))
    )
    exact = softmax_attention(q, k, k, impl="torch"), latent_attention(q, latents, up, impl="torch")
    monkeypatch.setattr(attention_torch, "SHOWN", 120)
    monkeypatch.setattr(latent_attention_torch, "LOGITS", 2 * 3 * 60 * 2)
    blocks = softmax_attention(q, k, k, impl="torch"), latent_attention(q, latents, up, impl="torch")
    for o, expected in zip(blocks, exact, strict=True):
        torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
