"""What is written for models of transformers works unchanged: lm-eval and TRL, for real and in small."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("transformers", minversion="5.15")
from transformers import AutoModelForCausalLM

from intarsia.checkpoints.native import load_model, save_model
from intarsia.integrations.huggingface import register
from support.arithmetic import ALL, END, SUMS, accuracy, chance, model, taught, tokenizer

# The libraries take many seconds to import: they are where they are used.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(find_spec, ("lm_eval", "trl", "datasets"))),
        reason="the extra `ecosystem` is not installed",
    ),
]


@pytest.fixture(autouse=True)
def registered():
    register()


@pytest.fixture(scope="module")
def halfway():
    """A model that answers some of the sums."""
    torch.manual_seed(0)
    return taught(model(), 0.6)


def training(config, folder, **options):
    defaults = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    return config(**{**defaults, **options})


# lm-eval


TASK = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
CHOICE = (
    'doc_to_choice: ["0", "1", "2", "3", "4", "5", "6", "7", "8"]\n'
    'metric_list: [{metric: acc}]\ntarget_delimiter: ""'
)
WRITTEN = (
    "generation_kwargs: {until: ['<end>'], max_gen_toks: 3, do_sample: false}\n"
    "metric_list: [{metric: exact_match}]"
)


@pytest.mark.parametrize(("kind", "more", "metric"), [
    ("multiple_choice", CHOICE, "acc,none"),
    ("generate_until", WRITTEN, "exact_match,none"),
])  # fmt: skip
def test_lm_eval_counts_what_the_model_answers(halfway, tmp_path, kind, more, metric):
    """Its batches are padded on the right for likelihoods and on the left for texts."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in SUMS))
    (tmp_path / "sums.yaml").write_text(TASK.format(data=data, kind=kind, more=more))
    judged = HFLM(pretrained=halfway.eval(), tokenizer=tokenizer(), batch_size=4, max_length=32)
    found = simple_evaluate(
        judged, tasks=["sums"], task_manager=TaskManager(include_path=str(tmp_path)), bootstrap_iters=0
    )
    score = found["results"]["sums"][metric]
    if kind == "multiple_choice":
        choices = tokenizer()([*"012345678"]).input_ids
        questions = tokenizer()([q for q, _ in SUMS], return_tensors="pt").input_ids
        with torch.no_grad():
            best = halfway.model(questions).logits[:, -1][:, [c[0] for c in choices]].argmax(-1)
        assert score == pytest.approx(
            sum(str(b.item()) == a for b, (_, a) in zip(best, SUMS, strict=True)) / 25
        )
        assert 0.2 < score < 1
    else:
        right = 0
        for question, answer in SUMS:
            ids = tokenizer()(question, return_tensors="pt").input_ids
            out = halfway.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=1)
            text = tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            right += text.strip() == answer
        assert score == pytest.approx(right / 25)


def test_commands_of_other_libraries_know_the_model(halfway, tmp_path):
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in SUMS))
    (tmp_path / "sums.yaml").write_text(TASK.format(data=data, kind="multiple_choice", more=CHOICE))
    save_model(tmp_path / "model", halfway.model)
    tokenizer().save_pretrained(tmp_path / "model" / "tokenizer")  # where ours has it: nobody need say so
    command = [sys.executable, "-m", "intarsia.integrations.huggingface", "lm_eval", "--model", "hf"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},max_length=32", "--tasks", "sums"]
    command += [
        "--include_path",
        str(tmp_path),
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|sums|" in done.stdout


# TRL


def questions_and_answers():
    import datasets

    return datasets.Dataset.from_list([{"prompt": q, "completion": a + END} for q, a in SUMS])


def test_sft_teaches_and_saves(tmp_path):
    from trl import SFTConfig, SFTTrainer

    seat = model(ALL)
    arguments = training(
        SFTConfig, tmp_path, max_steps=40, per_device_train_batch_size=25, learning_rate=3e-3,
        gradient_checkpointing=True, max_length=16,
    )  # fmt: skip
    trainer = SFTTrainer(seat, arguments, train_dataset=questions_and_answers(), processing_class=tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    trainer.save_model(tmp_path / "saved")
    assert all(
        torch.equal(x, y)
        for x, y in zip(load_model(tmp_path / "saved").parameters(), seat.model.parameters(), strict=True)
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert accuracy(loaded) == accuracy(seat.eval())


def test_sft_without_padding_is_sft_with_it(tmp_path):
    """Sequences in one row, told by their positions, are kept apart."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    texts = [f"{a}+{b}={a + b}" + "+1" * a for a in range(5) for b in range(5)]
    losses = []
    for free in (False, True):
        arguments = training(
            SFTConfig, tmp_path, max_steps=3, per_device_train_batch_size=25, learning_rate=1e-3, padding_free=free,
            max_length=None,
        )  # fmt: skip
        data = datasets.Dataset.from_list([{"text": text} for text in texts])
        trainer = SFTTrainer(model(ALL), arguments, train_dataset=data, processing_class=tokenizer())
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_grpo_raises_the_reward(halfway, tmp_path):
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    right = dict(SUMS)

    def reward(prompts, completions, **_):
        return [float(c[:1] == right[p]) for p, c in zip(prompts, completions, strict=True)]

    seat = copy.deepcopy(halfway)
    before = chance(seat.eval())
    arguments = training(
        GRPOConfig, tmp_path, max_steps=60, per_device_train_batch_size=64, num_generations=8, beta=0.0,
        max_completion_length=2, learning_rate=2e-3, temperature=1.0, seed=1, lr_scheduler_type="constant",
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"prompt": question} for question, _ in SUMS])
    trainer = GRPOTrainer(seat, reward, arguments, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    first, last = sum(rewards[:10]) / 10, sum(rewards[-10:]) / 10
    assert last > first + 0.12  # of 640 answers each: 0.02 is chance
    assert chance(seat.eval()) > before + 0.12
