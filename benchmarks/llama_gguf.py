"""Writes a Kimi Linear model of ours as the GGUF file that llama.cpp reads (architecture `kimi-linear`).

Names and shapes are those of llama.cpp's converter. There is no tokenizer in the file, since `llama-bench` needs none;
for `llama-server` there may be one of made-up words.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import UnsupportedError
from intarsia.mixers.kda import KimiDeltaAttention
from intarsia.mixers.mla import LatentAttention
from intarsia.model import LanguageModel
from intarsia.model.block import Block
from intarsia.model.feed_forward import SwiGLU

Named = Iterator[tuple[str, Tensor]]
CONTEXT = 1 << 20
KINDS = {"bfloat16": None, "int8": "Q8_0", "int4": "Q4_0"}
"""What llama.cpp calls our formats; None: what is written."""


def write_gguf(model: LanguageModel, path: Path, words: bool = False) -> None:
    """Write the model, matrices in bfloat16 and all else in float32.

    Args:
        words: let each token be a word of its own, behind signs and bytes; `llama-server` writes none without.

    Raises:
        UnsupportedError: the `gguf` package is missing, or the model is not made of KDA, MLA without positions and
            dense feed-forwards.
    """
    try:
        import gguf
    except ImportError:
        raise UnsupportedError("writing GGUF needs the gguf package: pip install gguf") from None
    writer = gguf.GGUFWriter(path, "kimi-linear")
    _write_options(writer, gguf, model)
    if words:
        _write_words(writer, gguf, model.config.vocab_size)
    else:
        writer.add_tokenizer_model("no_vocab")
    for name, x in _tensors(model):
        values = x.detach().float().contiguous().numpy()
        # llama.cpp keeps what it multiplies element by element in float32.
        if (
            x.dim() < 2
            or any(part in name for part in ("ssm_conv1d", "ssm_a.", "ssm_dt"))
            or name.endswith("ssm_a")
        ):
            writer.add_tensor(name, values)
            continue
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(llama: Path, plain: Path, file: Path, kind: str, threads: int) -> None:
    """Let llama.cpp quantise a GGUF file.

    Args:
        llama: the folder with `llama-quantize`.
        kind: its name of the format, as `Q8_0`.
    """
    # These are small, and llama.cpp's AMX products of integers cannot take them.
    kept = [
        word
        for tensor in ("attn_k_b", "attn_v_b", "ssm_beta")
        for word in ("--tensor-type", f"{tensor}=bf16")
    ]
    output_of(llama / "llama-quantize", *kept, plain, file, kind, threads)


def output_of(*command: object) -> str:
    """What a program prints.

    Raises:
        UnsupportedError: it failed.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UnsupportedError(f"{' '.join(words)} failed: {done.stderr.strip()[-400:]}")
    return done.stdout


def _write_options(writer: Any, gguf: Any, model: LanguageModel) -> None:
    mixers = [block.mixer for block in model.blocks]
    kda = next(mixer for mixer in mixers if isinstance(mixer, KimiDeltaAttention)).config
    mla = next(mixer for mixer in mixers if isinstance(mixer, LatentAttention)).config
    feed_forward = model.blocks[0].feed_forward
    if type(feed_forward) is not SwiGLU:
        raise UnsupportedError("only models with dense SwiGLU feed-forwards are written as GGUF")
    writer.add_name("intarsia")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(model.config.d_model)
    writer.add_block_count(len(mixers))
    writer.add_feed_forward_length(feed_forward.down.in_features)
    writer.add_head_count(kda.num_heads)
    writer.add_head_count_kv([int(isinstance(mixer, LatentAttention)) for mixer in mixers])
    writer.add_layer_norm_rms_eps(model.config.norm_eps)
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_ssm_conv_kernel(kda.conv_size)
    writer.add_kda_head_dim(kda.head_dim)
    writer.add_kv_lora_rank(mla.kv_rank)
    writer.add_rope_dimension_count(mla.rope_dim)
    writer.add_key_length(mla.kv_rank + mla.rope_dim)
    writer.add_value_length(mla.kv_rank)
    writer.add_key_length_mla(mla.key_dim)
    writer.add_value_length_mla(mla.v_dim)
    writer.add_leading_dense_block_count(len(mixers))
    # The reader asks for these though no layer has experts.
    writer.add_expert_feed_forward_length(feed_forward.down.in_features)
    writer.add_expert_shared_count(1)
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _write_words(writer: Any, gguf: Any, count: int) -> None:
    signs = ["<unk>", "<s>", "</s>"]
    spelled = [*signs, *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = gguf.TokenType
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    words = [f"\u2581w{token}" for token in range(len(spelled), count)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*spelled, *words])
    writer.add_token_scores([0.0] * count)
    writer.add_token_types([*types, *[kinds.NORMAL] * len(words)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def _tensors(model: LanguageModel) -> Named:
    yield "token_embd.weight", model.embed.weight
    for number, block in enumerate(model.blocks):
        before = f"blk.{number}."
        assert isinstance(block, Block)
        assert block.feed_forward_norm is not None
        yield before + "attn_norm.weight", block.mixer_norm.weight
        yield before + "ffn_norm.weight", block.feed_forward_norm.weight
        for part in ("gate", "up", "down"):
            yield f"{before}ffn_{part}.weight", getattr(block.feed_forward, part).weight
        mixer = block.mixer
        if isinstance(mixer, KimiDeltaAttention):
            made = _kda(mixer)
        elif isinstance(mixer, LatentAttention) and mixer.config.q_rank is None and not mixer.config.rotate:
            made = _mla(mixer)
        else:
            raise UnsupportedError(
                f"layer {number} is {type(mixer).__name__}: only KDA and MLA without positions"
            )
        yield from ((before + name, x) for name, x in made)
    yield "output_norm.weight", model.norm.weight
    yield "output.weight", model.head.weight


def _kda(layer: KimiDeltaAttention) -> Named:
    if layer.conv is None or layer.output_gate_proj is None or isinstance(layer.decay_proj, torch.nn.Linear):
        raise UnsupportedError("llama.cpp's KDA has a convolution and gates of low rank")
    width = layer.conv.weight.shape[-1]
    for part, weight in zip("qkv", layer.conv.weight.chunk(3), strict=True):
        yield f"ssm_conv1d_{part}.weight", weight.reshape(1, -1, 1, width)
        yield f"attn_{part}.weight", getattr(layer, f"{part}_proj").weight
    for name, gate in (("f", layer.decay_proj), ("g", layer.output_gate_proj)):
        for part, linear in zip("ab", gate.children(), strict=True):
            assert isinstance(linear, torch.nn.Linear)
            yield f"ssm_{name}_{part}.weight", linear.weight
    yield "ssm_beta.weight", layer.beta_proj.weight
    yield "ssm_a", -layer.decay.A_log.exp().reshape(1, 1, -1, 1)
    yield "ssm_dt.bias", layer.decay.dt_bias
    yield "ssm_norm.weight", layer.norm.weight
    yield "attn_output.weight", layer.o_proj.weight


def _mla(layer: LatentAttention) -> Named:
    c = layer.config
    keys, values = layer.kv_up_proj.weight.unflatten(0, (c.num_heads, -1)).split([c.nope_dim, c.v_dim], dim=1)
    yield "attn_kv_a_norm.weight", layer.kv_norm.weight
    yield "attn_q.weight", layer.q_proj.weight
    yield "attn_kv_a_mqa.weight", layer.kv_down_proj.weight
    yield "attn_k_b.weight", keys.transpose(1, 2)
    yield "attn_v_b.weight", values
    yield "attn_output.weight", layer.o_proj.weight
