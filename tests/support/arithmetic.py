"""Additions of one digit, a tokenizer for them, and a small model that has learned them a little."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from intarsia.integrations.huggingface import IntarsiaForCausalLM
from intarsia.model import LanguageModel, ModelConfig
from intarsia.model.config import FeedForwardConfig
from support.small_models import MIXERS

PAD, END = "<pad>", "<end>"
ALL = "kda gdn mamba2 lightning window attention mla-rotated"
SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(5) for b in range(5)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character."""
    words = {word: n for n, word in enumerate([PAD, END, *"0123456789+="])}
    made = Tokenizer(WordLevel(words, unk_token=END))
    made.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD, eos_token=END, padding_side="left", model_max_length=64
    )


def model(layout: str = "gdn kda window mla-rotated", seed: int = 0) -> IntarsiaForCausalLM:
    """Untrained."""
    config = ModelConfig(
        vocab_size=14,
        d_model=32,
        depth=len(layout.split()),
        layout=layout,
        mixers={name: MIXERS[name] for name in layout.split()},
        feed_forward=FeedForwardConfig(d_hidden=64),
    )
    made = LanguageModel(config)
    made.init_weights(seed)
    return IntarsiaForCausalLM.of(made, eos_token_id=1, pad_token_id=0)


def accuracy(seat: IntarsiaForCausalLM) -> float:
    """How many of all sums it answers, greedily."""
    known = tokenizer()
    batch = known([question for question, _ in SUMS], return_tensors="pt")
    with torch.no_grad():
        best = seat(batch.input_ids, attention_mask=batch.attention_mask).logits[:, -1].argmax(-1)
    return sum(known.decode(token) == answer for token, (_, answer) in zip(best, SUMS, strict=True)) / len(
        SUMS
    )


def chance(seat: IntarsiaForCausalLM) -> float:
    """How likely a sampled answer is right, over all sums: exactly what a reward for right answers is in the mean."""
    known = tokenizer()
    batch = known([question for question, _ in SUMS], return_tensors="pt")
    answers = torch.tensor([known(answer).input_ids for _, answer in SUMS])
    with torch.no_grad():
        logits = seat(batch.input_ids, attention_mask=batch.attention_mask).logits[:, -1]
    return logits.softmax(-1).gather(1, answers).mean().item()


def taught(seat: IntarsiaForCausalLM, at_least: float) -> IntarsiaForCausalLM:
    """The model when it answers so many, by plain training."""
    known = tokenizer()
    texts = known([question + answer + END for question, answer in SUMS], return_tensors="pt")
    optimizer = torch.optim.AdamW(seat.train().parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        seat(texts.input_ids, labels=texts.input_ids).loss.backward()
        optimizer.step()
        if accuracy(seat) >= at_least:
            return seat
    raise AssertionError("the model does not learn to add")
