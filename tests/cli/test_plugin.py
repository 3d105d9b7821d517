"""`--plugin my_layer.py`: a mixer in a file of one's own by the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Cli = Callable[..., Any]
EXAMPLE = Path(__file__).parents[2] / "examples" / "new_mixer" / "learned_decay.py"
MODEL = """
corpus = { source = "texts/*.txt", tokenizer = "bytes" }
training = { steps = 4, rows = 2, length = 64, checkpoint_every = 2 }

[model]
d_model = 32
depth = 2
layout = "mine kda"
feed_forward.d_hidden = 32
mixers.mine = { type = "learned-decay", num_heads = 2, head_dim = 16 }
mixers.kda = { type = "kda", num_heads = 2, head_dim = 16 }
"""


def test_trained_inspected_and_asked(cli: Cli, inputs: Path, forget: Callable[[], None]) -> None:
    plugin = ("--plugin", "my_layer.py")
    (inputs / "mine.toml").write_text(MODEL)
    done = cli("train", "mine.toml")
    assert done.status == 2
    assert "mine.toml:10: model.mixers.mine.type: there is no mixer 'learned-decay'" in done.err
    assert "--plugin FILE.py, or from an installed package" in done.err
    done = cli("train", "mine.toml", *plugin, "--json")
    assert done.status == 0, done.err
    record = json.loads((inputs / "runs" / "mine" / "config.json").read_text())
    assert record["fingerprint"]["code"]["my_layer"]
    for verb in (["inspect", "runs/mine"], ["generate", "runs/mine", "one", "-n", "3"]):
        forget()
        done = cli(*verb)
        assert done.status == 2
        assert f"It was trained with --plugin {inputs / 'my_layer.py'}" in done.err
        assert cli(*verb, *plugin).status == 0
    assert "Retention with learnt decays" in cli("mixers", "learned-decay", *plugin).out


def test_a_run_goes_on_with_the_same_code_alone(cli: Cli, inputs: Path, forget: Callable[[], None]) -> None:
    (inputs / "mine.toml").write_text(MODEL)
    command = ("train", "mine.toml", "--plugin", "my_layer.py")
    assert cli(*command).status == 0
    run = inputs / "runs" / "mine"

    def interrupted() -> None:
        (run / "result.json").unlink()
        shutil.rmtree(run / "model")
        forget()

    interrupted()
    again = cli(*command)
    assert again.status == 0, again.err
    assert "4 steps" in again.out
    interrupted()
    layer = inputs / "my_layer.py"
    layer.write_text(layer.read_text().replace("uniform_(2, 6", "uniform_(1, 6"))
    changed = cli(*command)
    assert changed.status == 2
    assert "the code of my_layer changed" in changed.err
