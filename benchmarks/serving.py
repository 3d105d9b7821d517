"""How fast is the server, beside transformers' `generate` one by one and llama.cpp's server, on the same weights?

    python benchmarks/serving.py [--llama BIN] [--users 1,8,32] [--weights bfloat16,int8]
                                 [--parts users,turns,document,bytes] [--out FILE.json]

The model is a Kimi Linear of transformers without experts and with random weights, in bfloat16: 180 M parameters, six
layers of KDA and two of MLA, of the width of `inference.py`. Intarsia loads what transformers has saved, and writes it
for llama.cpp (`--llama`: a folder with `llama-server` and `llama-quantize`) as GGUF, with a vocabulary of made-up
words; llama.cpp quantises it itself (Q8_0 beside int8, Q4_0 beside int4). Servers are processes of their own, and all
requests go over HTTP, as streams.

    users      each sends a prompt of its own, all at once, and reads the answer: tokens of answers a second, and the
               times to the first token and between tokens
    turns      a long chat goes on: the time to the first token of its second turn, beside that of a chat that is only
               as long as what is new, and of a model that has the states at hand and reads what is new behind them
    document   a text is being continued while a long document is read: by a smaller hybrid, of KDA and attention to a
               window, in which a million tokens take two minutes and no more memory than a thousand
               (or to latents: `--layout "kda kda kda mla"`)
    bytes      what the states of one user take, beside the keys and values of attention in all layers

Nobody guesses ahead: all write a token at a time.
"""

from __future__ import annotations

import argparse
import random
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common import machine, median, options_parser, table, write_results
from intarsia.checkpoints.native import save_model
from intarsia.checkpoints.opening import load
from intarsia.mixers import AttentionConfig, KDAConfig, MLAConfig, SlidingWindowConfig
from intarsia.model import InferenceModel, LanguageModel, ModelConfig
from intarsia.model.config import FeedForwardConfig
from intarsia.ops import Sequences
from llama_gguf import KINDS, quantise, write_gguf
from serving_clients import MODEL, Server, beside, together

VOCABULARY = 32768
WORDS = 300
"""Token ids below this are not asked for: in llama.cpp's vocabulary they are bytes and signs."""
Row = dict[str, Any]


def prompts(count: int, tokens: int, seed: int) -> list[list[int]]:
    """Prompts that have nothing in common."""
    chance = random.Random(seed)
    return [[chance.randrange(WORDS, VOCABULARY) for _ in range(tokens)] for _ in range(count)]


def quantiles(values: Sequence[float]) -> Row:
    """Milliseconds."""
    ordered = sorted(values)
    return {f"p{q}_ms": 1000 * ordered[min(len(ordered) * q // 100, len(ordered) - 1)] for q in (50, 95, 99)}


def write_model(folder: Path) -> None:
    """The model, as transformers writes it."""
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearForCausalLM

    layers = 8
    config = KimiLinearConfig(
        vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
        mlp_layer_types=["dense"] * layers, num_attention_heads=8, num_key_value_heads=8,
        linear_num_heads=8, linear_head_dim=128, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        max_position_embeddings=1 << 17,
    )  # fmt: skip
    torch.manual_seed(0)
    model: torch.nn.Module = KimiLinearForCausalLM(config)
    model.to(torch.bfloat16)
    model.save_pretrained(folder)  # type: ignore[operator]  # a PreTrainedModel


def ours(
    options: argparse.Namespace,
    folder: Path,
    tokens: int = 1 << 16,
    sequences: int = 32,
    weights: str = "bfloat16",
) -> Server:
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("serving_ours.py")), str(folder), str(port)]
    settings = [tokens, sequences, options.step_tokens, options.step_seconds, options.threads, weights]
    return Server([*command, *map(str, settings)], port)


def llama(options: argparse.Namespace, gguf: Path, slots: int, context: int) -> Server:
    port = free_port()
    command = [
        str(Path(options.llama) / "llama-server"), "-m", str(gguf), "-t", str(options.threads), "-np", str(slots),
        "-c", str(context), "--port", str(port), "--no-webui",
    ]  # fmt: skip
    return Server(command, port, {"ignore_eos": True, "cache_prompt": True})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def users(name: str, server: Server, count: int, options: argparse.Namespace) -> Row:
    """One row: so many users at once, once to warm up and once to be measured."""
    together(server, prompts(min(count, 2), 32, seed=999), 4)
    answers, seconds = together(server, prompts(count, options.prompt, seed=count), options.answer)
    gaps = [gap for each in answers for gap in each.gaps]
    return {
        "server": name, "users": count, "tokens_s": count * options.answer / seconds,
        "first": quantiles([each.first for each in answers]), "between": quantiles(gaps),
    }  # fmt: skip


def of_users(
    options: argparse.Namespace, folder: Path, plain: Path, weights: str, counts: Sequence[int]
) -> list[Row]:
    """The rows of one format of weights. Both servers take turns, `--rounds` times; medians."""
    file, kind = plain, KINDS[weights]
    if options.llama and kind is not None:
        file = plain.with_name(f"{kind}.gguf")
        quantise(Path(options.llama), plain, file, kind, options.threads)
    size = options.prompt + options.answer
    runs: dict[tuple[str, int], list[Row]] = {}
    for _ in range(options.rounds):
        with ours(options, folder, max(1 << 16, 2 * max(counts) * size), weights=weights) as server:
            for count in counts:
                runs.setdefault(("intarsia", count), []).append(users("intarsia", server, count, options))
        for count in counts if options.llama else []:
            with llama(options, file, count, count * 2 * size) as server:
                runs.setdefault(("llama.cpp", count), []).append(users("llama.cpp", server, count, options))
    rows = []
    for found in runs.values():
        speeds = sorted(row["tokens_s"] for row in found)
        middle = min(found, key=lambda row: abs(row["tokens_s"] - median(speeds)))
        rows.append({**middle, "weights": weights, "slowest": speeds[0], "fastest": speeds[-1]})
    mine = {row["users"]: row["tokens_s"] for row in rows if row["server"] == "intarsia"}
    for row in rows:
        row["intarsia_times_this"] = mine[row["users"]] / row["tokens_s"]
        row["step_seconds"] = options.step_seconds if row["server"] == "intarsia" else None
    return rows


def one_by_one(folder: Path, options: argparse.Namespace) -> Row:
    """transformers' `generate`, which serves one after the other."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def answer(prompt: list[int], tokens: int) -> float:
        begun = time.perf_counter()
        row = torch.tensor([prompt])
        with torch.inference_mode():
            made = model.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        assert made.shape[1] == len(prompt) + tokens
        return time.perf_counter() - begun

    (first, *rest) = prompts(options.one_by_one + 1, options.prompt, seed=77)
    answer(first[:32], 4)
    seconds = [answer(prompt, options.answer) for prompt in rest]
    return {"server": "transformers", "users": 1, "tokens_s": options.answer * len(seconds) / sum(seconds)}


def turns(name: str, server: Server, chat: int, new: int) -> Row:
    """The second turn of a long chat, beside a short chat of what is new alone."""
    (beginning, first, second, *short) = (*prompts(1, chat, seed=1), *prompts(5, new, seed=2))
    short_first = [together(server, [each], 1)[0][0].first for each in short]
    whole = together(server, [beginning], 1)[0][0].first
    said = together(server, [beginning], 64)[0][0].tokens
    again = [together(server, [[*beginning, *said, *turn]], 1)[0][0].first for turn in (first, second)]
    return {
        "server": name, "chat": chat, "new": new, "first_turn_s": whole, "second_turn_s": again[0],
        "other_second_turn_s": again[1],
        "new_alone_s": median(short_first),
    }  # fmt: skip


def behind(folder: Path, chat: int, new: int) -> float:
    """The seconds that a model needs for `new` tokens behind the states of a chat, at least."""
    model = InferenceModel(load(folder))
    (beginning, *parts) = (*prompts(1, chat, seed=1), *prompts(3, new, seed=3))
    pool = model.new_pool(4, 2 * chat + 8 * new)
    slot = pool.take()
    for begin in range(0, chat, 512):
        piece = beginning[begin : begin + 512]
        model(torch.tensor([piece]), pool.view([slot]), Sequences((len(piece),)), last_only=[1])
    seconds = []
    for part in parts:
        fork = pool.fork(slot)
        begun = time.perf_counter()
        model(torch.tensor([part]), pool.view([fork]), Sequences((len(part),)), last_only=[1])
        seconds.append(time.perf_counter() - begun)
        pool.free(fork)
    return median(seconds)


def write_small_hybrid(folder: Path, layout: str) -> None:
    """A hybrid of width 256: of KDA, and attention to a window, with which its states do not grow with the text, or
    to latents."""
    config = ModelConfig(
        vocab_size=VOCABULARY, d_model=256, depth=4, layout=layout,
        mixers={
            "mla": MLAConfig(2, kv_rank=128, nope_dim=64, rope_dim=32, v_dim=64),
            "kda": KDAConfig(num_heads=2, head_dim=128),
            "window": SlidingWindowConfig(num_heads=2, head_dim=128, window=4096),
        },
        feed_forward=FeedForwardConfig(768), tie_embeddings=False,
    )  # fmt: skip
    model = LanguageModel(config)
    model.init_weights(0)
    save_model(folder, model.to(torch.bfloat16))


def document(options: argparse.Namespace, folder: Path) -> Row:
    """A text that is continued, alone and beside a document."""
    size = options.document
    with ours(options, folder, size + (1 << 15), 4) as server:
        together(server, prompts(2, 64, seed=5), 4)
        (chat,), (text,) = prompts(1, options.prompt, seed=6), prompts(1, size, seed=7)
        memory_before = server.peak_memory
        told, before, took = beside(server, chat, text, 4.0, options.seconds)
        read = next(
            float(line.split()[1])
            for line in server.read("/metrics").splitlines()
            if line.startswith("intarsia_read_tokens_total")
        )
        grown = server.peak_memory - memory_before
    return {
        "model": f"{options.layout}, width 256", "document": size, "read": min(int(read), size),
        "read_whole_s": took, "step_tokens": options.step_tokens, "step_seconds": options.step_seconds,
        "memory_mb": memory_before / 1e6, "grown_mb": grown / 1e6,
        "alone": quantiles(told.gaps[: before - 1]), "beside": quantiles(told.gaps[before:]),
    }  # fmt: skip


def memory(folder: Path, contexts: Sequence[int]) -> list[Row]:
    """Bytes that one user's pool takes, of the hybrid and of attention in all layers."""
    hybrid = InferenceModel(load(folder))
    config = ModelConfig(
        vocab_size=VOCABULARY, d_model=1024, depth=8, layout="attention",
        mixers={"attention": AttentionConfig(num_heads=8, head_dim=128)},
        feed_forward=FeedForwardConfig(3072), tie_embeddings=False,
    )  # fmt: skip
    full = InferenceModel(LanguageModel(config).to(torch.bfloat16))

    def taken(model: InferenceModel, tokens: int) -> int:
        size: int = model.new_pool(1, tokens).nbytes
        return size

    rows = []
    for n in contexts:
        mine, theirs = taken(hybrid, n), taken(full, n)
        rows.append({"context": n, "hybrid": mine, "full_attention": theirs, "ratio": theirs / mine})
    return rows


def flat(row: Row) -> Row:
    """A row for the table."""
    parts = {name: part for name, part in row.items() if not isinstance(part, dict)}
    return parts | {
        f"{n} {key}": v for n, part in row.items() if isinstance(part, dict) for key, v in part.items()
    }


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--llama", help="a folder with llama-server")
    parser.add_argument("--users", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each user's prompt")
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--weights", default="bfloat16", help="formats for users: bfloat16, int8, int4")
    parser.add_argument("--rounds", type=int, default=3, help="in which the servers take turns")
    parser.add_argument("--parts", default="users,turns,document,bytes")
    parser.add_argument("--chat", type=int, default=15000, help="tokens of the long chat")
    parser.add_argument("--new", type=int, default=200, help="tokens of its next turn")
    parser.add_argument("--document", type=int, default=1 << 20, help="tokens of the document")
    parser.add_argument(
        "--layout", default="kda kda kda window", help="of the model that reads it: of kda, window, mla"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="that the document may take")
    parser.add_argument("--step-tokens", type=int, default=512)
    parser.add_argument("--step-seconds", type=float, default=0.5)
    parser.add_argument("--one-by-one", type=int, default=3, help="requests to transformers' generate")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts, counts = options.parts.split(","), [int(n) for n in options.users.split(",")]
    results: Row = {"machine": machine(), "model": MODEL, "prompt": options.prompt, "answer": options.answer}

    def keep(name: str, rows: list[Row]) -> None:
        for row in rows:
            table([flat(row)])
        results[name] = rows
        if options.out:
            write_results(options.out, results)

    with tempfile.TemporaryDirectory() as place:
        folder, gguf = Path(place) / "transformers", Path(place) / "model.gguf"
        write_model(folder)
        if options.llama:
            write_gguf(load(folder).float(), gguf, words=True)
        if "users" in parts:
            rows = [one_by_one(folder, options) if options.one_by_one else {}]
            for weights in options.weights.split(","):
                rows += of_users(options, folder, gguf, weights, counts)
            if one := rows.pop(0):
                # One by one there is one speed for however many.
                one["intarsia_times_this_by_users"] = {
                    f"{row['weights']} {row['users']}": row["tokens_s"] / one["tokens_s"]
                    for row in rows
                    if row["server"] == "intarsia"
                }
                rows.insert(0, one)
            keep("users", rows)
        if "turns" in parts:
            with ours(options, folder) as server:
                rows = [turns("intarsia", server, options.chat, options.new)]
            rows[0]["model_alone_s"] = behind(folder, options.chat, options.new)
            if options.llama:
                with llama(options, gguf, 2, 4 * options.chat) as server:
                    rows.append(turns("llama.cpp", server, options.chat, options.new))
            keep("turns", rows)
        if "document" in parts:
            small = Path(place) / "small"
            write_small_hybrid(small, options.layout)
            keep("document", [document(options, small)])
        if "bytes" in parts:
            keep("bytes", memory(folder, (1024, 8192, 32768, 131072)))


if __name__ == "__main__":
    main()
