"""Each family against transformers' own class, or the published equations: the same weights, read and written, give the
same logits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.checkpoints.family import Family
from intarsia.checkpoints.opening import family_that_holds, save
from intarsia.checkpoints.opening import load as load_as_it_is
from intarsia.checkpoints.registry import CHECKPOINTS, family
from intarsia.errors import UnsupportedError
from support.checkpoint_cases import CASES, Case, their_class, their_folder, their_model, tokens

pytest.importorskip("transformers")

each_case = pytest.mark.parametrize("case", CASES, ids=str)


def family_of(case: Case) -> Family:
    return family(case.family)


WRITTEN = [case for case in CASES if family_of(case).write is not None and case.sparse == "published"]


def load(case: Case, *args: Any, **kwargs: Any) -> Any:
    """The model in a folder; where its attention is sparse, only when that is asked for, and with a warning."""
    if case.sparse == "published":
        return load_as_it_is(*args, **kwargs)
    with pytest.warns(UserWarning, match="indexer"):
        return load_as_it_is(*args, **kwargs, sparse=case.sparse)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def their_logits(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).logits.float()


def in_pieces(model: Any, x: Tensor, lengths: list[int]) -> Tensor:
    states, logits = model.init_states(x.shape[0]), []
    with torch.no_grad():
        for piece in x.split(lengths, dim=1):
            output = model(piece, states=states)
            states = output.states
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


def with_joined_convolutions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convolutions of q, k and v as one: transformers saves three of one size, whatever sizes they have."""
    of = {name: name.replace(".q_conv1d", ".conv1d") for name in tensors if ".q_conv1d" in name}
    joined = {
        one: torch.cat([tensors.pop(name.replace(".q_", f".{x}_")) for x in "qkv"])
        for name, one in of.items()
    }
    return {**tensors, **joined}


def test_every_family_has_a_case() -> None:
    assert {case.family for case in CASES} == set(CHECKPOINTS)


@each_case
@pytest.mark.parametrize("runtime", [False, True], ids=["released", "runtime"])
def test_gives_their_logits(case: Case, runtime: bool, tmp_path: Path) -> None:
    model = load(case, their_folder(case, tmp_path, runtime))
    x = tokens(70)
    with torch.no_grad():
        got = model(x).logits
    expected = their_logits(their_model(case), x)
    assert expected.std() > 0.05, "the weights are too small to tell anything"
    close(got, expected)
    if runtime:
        return
    close(in_pieces(model, x, [1, 33, 2, 34]), expected)
    close(in_pieces(model, x[:, :12], [1] * 12), expected[:, :12])


CHOOSING = ("deepseek_v32", "glm_moe_dsa", "glm5_next", "qwen4_exp", "minimax_m3", "minicpm_sala")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.family in CHOOSING and case.sparse == "published"], ids=str
)
def test_token_by_token_they_choose_as_in_one(case: Case, tmp_path: Path) -> None:
    """Behind more tokens than any of them reads: 20 at most."""
    model, x = load(case, their_folder(case, tmp_path)), tokens(52)
    expected = their_logits(their_model(case), x)
    close(in_pieces(model, x, [30, *[1] * 22]), expected)


@pytest.mark.parametrize("case", [case for case in CASES if case not in WRITTEN], ids=str)
def test_what_is_only_read_is_saved_as_what_it_became(case: Case, tmp_path: Path) -> None:
    model, x = load(case, their_folder(case, tmp_path / "theirs")), tokens(9)
    try:
        became = family_that_holds(model.config).short
    except UnsupportedError:
        became = "intarsia"
    if became != case.family:  # one that has layers without indexers too
        with pytest.raises(
            UnsupportedError, match=r"only read|, and the family has |layers are all of 'dsa'"
        ):
            save(model, tmp_path / "ours", case.family)
    save(model, tmp_path / "ours", became)
    again = load_as_it_is(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize("case", WRITTEN, ids=str)
def test_what_is_saved_is_theirs_again(case: Case, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    there = their_folder(case, tmp_path / "theirs")
    model = load(case, there)
    save(model, tmp_path / "ours", case.family)
    theirs, ours = (load_file(tmp_path / x / "model.safetensors") for x in ("theirs", "ours"))
    for pattern, released in case.renamed:
        theirs = {re.sub(pattern, released, name): tensor for name, tensor in theirs.items()}
    theirs, ours = with_joined_convolutions(theirs), with_joined_convolutions(ours)
    computed, left_out = family_of(case).computed, ("model.visual.", "model.vision_tower.")
    theirs = {
        name: tensor
        for name, tensor in theirs.items()
        if not name.endswith(computed) and not name.startswith(left_out)
    }
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    again = their_class(case, case.model).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype=torch.float32
    )
    close(their_logits(again.eval(), tokens(40)), their_logits(their_model(case), tokens(40)))
    assert load(case, tmp_path / "ours").config == model.config


@each_case
def test_bfloat16_keeps_the_budget(case: Case, tmp_path: Path) -> None:
    """The error against the same rounded weights in float64 is at most twice that of transformers' own bfloat16, and
    what must be float32 is."""
    narrow = their_model(case, torch.bfloat16)
    model, x = load(case, their_folder(case, tmp_path, dtype=torch.bfloat16)), tokens(40)
    assert model.embed.weight.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        if name.endswith(("A_log", "dt_bias", "router.weight", "router.bias")):
            assert tensor.dtype == torch.float32, name
    wide = load(case, tmp_path, torch.float64)
    with torch.no_grad():
        expected = wide(x).logits
        got = model(x).logits
    theirs = their_logits(narrow, x).double()
    error, movement = (y.double() - expected for y in (got, theirs))
    assert error.square().mean().sqrt() <= 2 * movement.square().mean().sqrt()


@each_case
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_is_quantised_on_loading(case: Case, weights: Any, tmp_path: Path) -> None:
    """Streamed from the file it is to the bit what the loaded model becomes."""
    from intarsia.model import InferenceModel

    folder = their_folder(case, tmp_path)
    whole = InferenceModel(load(case, folder), weights)
    streamed = load(case, folder, weights=weights)
    assert isinstance(streamed, InferenceModel)
    assert streamed.weight_bytes == whole.weight_bytes
    assert torch.equal(streamed(tokens(9), last_only=False).logits, whole(tokens(9), last_only=False).logits)  # type: ignore[arg-type]
