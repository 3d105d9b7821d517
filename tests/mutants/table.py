"""The mutants: what is broken, how, and the tests nearest to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A change of one place that makes the code wrong."""

    name: str
    file: str
    old: str
    """A text that occurs once in the file."""
    new: str
    tests: str
    """Arguments for pytest: the nearest tests, which should be the first to notice."""

    @property
    def is_compiled(self) -> bool:
        return self.file.startswith("csrc/")


def _in(folder: str, *mutants: tuple[str, str, str, str, str]) -> tuple[Mutant, ...]:
    return tuple(Mutant(name, f"{folder}/{file}", old, new, tests) for name, file, old, new, tests in mutants)


LINEAR = "tests/ops/test_linear.py -k chunked"
OPS = _in(
    "src/intarsia/ops",
    (
        "the reference without scale",
        "linear_reference.py",
        "repeat_interleave(group, dim=2) * call.scale",
        "repeat_interleave(group, dim=2)",
        LINEAR,
    ),
    (
        "the reference erases before the decay",
        "linear_reference.py",
        'recalled = torch.einsum("bhkv,bhk->bhv", S, k_t)',
        'recalled = torch.einsum("bhkv,bhk->bhv", S_before, k_t)',
        LINEAR,
    ),
    (
        "the later of equal scores is chosen",
        "selection.py",
        "equal.cumsum(-1, dtype=torch.int32)",
        "equal.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)",
        "tests/ops/test_sparse.py",
    ),
    (
        "hidden entries are chosen",
        "selection.py",
        "(scores == last) & shown",
        "(scores == last)",
        "tests/ops/test_sparse.py",
    ),
    (
        "blocks are chosen before they are complete",
        "indexer_torch.py",
        "(seen // block).expand",
        "((seen + block - 1) // block).expand",
        "tests/ops/test_sparse.py",
    ),
    (
        "an indexer taught by more than one distribution",
        "indexer_loss_torch.py",
        ".sum(dim=(2, 3)) / H",
        ".sum(dim=(2, 3))",
        "tests/ops/test_indexer_loss.py",
    ),
    (
        "an indexer of blocks taught by all heads alike",
        "blocks_loss_torch.py",
        "given = logits.softmax(dim=-1).mean(dim=(3, 4))",
        "given = logits.softmax(dim=-1).mean(dim=(2, 3, 4))[:, :, None]",
        "tests/ops/test_blocks_loss.py",
    ),
    (
        "sparse attention looks ahead within a block",
        "sparse_torch.py",
        "(picked[..., None] >= 0) & (token <= place[:, :, None, None, None])",
        "(picked[..., None] >= 0)",
        "tests/ops/test_sparse.py",
    ),
    ("chunks without scale", "chunked.py", 'part["q"] = part["q"] * call.scale', "pass", LINEAR),
    (
        "chunks in bfloat16",
        "chunked.py",
        "part = {name: x[n].to(dtype) for name, x in parts.items()}",
        "part = {name: x[n].bfloat16().to(dtype) for name, x in parts.items()}",
        LINEAR,
    ),
    (
        "a state that does not decay between chunks",
        "chunked.py",
        "S = (S if total is None else total * S) + columns @ write",
        "S = S + columns @ write",
        LINEAR,
    ),
    (
        "erasure without beta",
        "chunked.py",
        "inverse = unit_lower_inverse(beta[..., None] * kk)",
        "inverse = unit_lower_inverse(kk)",
        LINEAR,
    ),
    (
        "the general rule without what is written beside it",
        "chunked.py",
        "            S = S + besides",
        "            S = S + 0 * besides",
        "tests/ops/test_dplr.py",
    ),
    (
        "an inverse whose gradient has the other sign",
        "triangular.py",
        "return -(inverse.mT @ grad @ inverse.mT).tril(-1)",
        "return (inverse.mT @ grad @ inverse.mT).tril(-1)",
        LINEAR,
    ),
    (
        "a decay's gradient without the rows",
        "decay.py",
        "d_total_1 = d_total * total_2 + _dot(d_second_rows, second_rows)",
        "d_total_1 = d_total * total_2",
        LINEAR,
    ),
    (
        "a bounded gate without its rate",
        "gate.py",
        "torch.sigmoid(rate * wide)",
        "torch.sigmoid(wide)",
        "tests/ops/test_linear.py -k what_layers_leave",
    ),
    (
        "a rate inside softplus",
        "gate.py",
        "return -rate * F.softplus(wide)",
        "return -F.softplus(rate * wide)",
        "tests/mixers/test_delta_oracles.py tests/mixers/test_transformers.py tests/ops/test_linear.py",
    ),
    (
        "l2norm by the mean",
        "norm_torch.py",
        "wide.square().sum(-1, keepdim=True) + eps",
        "wide.square().mean(-1, keepdim=True) + eps",
        "tests/ops/test_parts.py tests/ops/test_linear.py",
    ),
    (
        "the path for few tokens without scale",
        "linear_few.py",
        "        scale=scale, normalize",
        "        normalize",
        "tests/ops/test_few.py",
    ),
    (
        "the step in PyTorch without scale",
        "decode_torch.py",
        "for part in (q * step.scale, k)",
        "for part in (q, k)",
        "tests/ops/test_decode.py -k torch",
    ),
    (
        "the step in PyTorch decays half as fast",
        "decode_torch.py",
        "        S = S * g.exp().view(1, step.value_heads, -1, 1)\n",
        "        S = S * g.exp().view(1, step.value_heads, -1, 1).sqrt()\n",
        "tests/ops/test_decode.py -k torch",
    ),
    (
        "native FLOPs of the delta rule with 4 for 6",
        "linear_cpu.py",
        "return B * T * HV * (6 * K * V",
        "return B * T * HV * (4 * K * V",
        "tests/ops/test_linear.py -k flops",
    ),
    (
        "the gradient of a fixed decay as a mean",
        "linear_cpu.py",
        "d_g = d_g.sum((0, 1))",
        "d_g = d_g.mean((0, 1))",
        "tests/ops/test_linear.py -k gradients_equal",
    ),
    (
        "a layout that forgets where sequences end",
        "chunk_layout.py",
        "torch.where(offset < lengths[rank, None], index, sum(self.lengths))",
        "index.clamp(max=sum(self.lengths))",
        "tests/ops/test_linear.py -k packed",
    ),
)

PROPERTIES = "tests/mixers/test_properties.py"
LAYERS = _in(
    "src/intarsia/layers",
    (
        "a micro-batch's gradient in place of the sum",
        "narrow.py",
        "            gradient.add_(part)",
        "            gradient.copy_(part)",
        "tests/training/test_narrow.py",
    ),
    (
        "a state one token behind",
        "recurrent.py",
        "return RecurrentValue(board, conv, self.tokens_after(x, seqs))",
        "return RecurrentValue(board, conv, self.tokens_after(x[:, 1:], seqs))",
        f"{PROPERTIES} -k gdn",
    ),
    (
        "the first token of a packed sequence after the one before it",
        "convolution.py",
        "return before.index_copy(1, starts, first[numbers].transpose(0, 1).to(x.dtype))",
        "return before",
        f"{PROPERTIES} -k rwkv7",
    ),
    (
        "a rotation the other way round",
        "rope.py",
        "torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)",
        "torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)",
        "tests/mixers/test_softmax_oracles.py tests/mixers/test_transformers.py",
    ),
    (
        "angles in float32",
        "rope.py",
        "angle = positions.to(torch.float64)[..., None, None] * frequency",
        "angle = positions.to(torch.float32)[..., None, None] * frequency.float()",
        "tests/mixers/test_softmax_oracles.py -k far",
    ),
    (
        "time steps ten times as large",
        "gates.py",
        "dt_bias.uniform_(math.log(1e-3), math.log(1e-1)",
        "dt_bias.uniform_(math.log(1e-2), math.log(1.0)",
        "tests/model/test_initialization.py tests/mixers",
    ),
    (
        "a fork that is not copied where both go on",
        "recurrent.py",
        "                    x[target] = x[source]",
        "                    x[target] = 0",
        "tests/mixers/test_pools.py -k together",
    ),
    (
        "pages that are shared and written to",
        "paging.py",
        "            if self._users[page] > 1:\n                self._users[page] -= 1",
        "            if self._users[page] > 2:\n                self._users[page] -= 1",
        "tests/mixers/test_paged.py",
    ),
    (
        "a window that gives back a page too early",
        "paging.py",
        "column = min(self._held_from(end if large else seen) // self.page_size, self._end[slot])",
        "column = min(self._held_from(end) // self.page_size + 1, self._end[slot])",
        "tests/mixers/test_paged.py",
    ),
)

ATTENTION = _in(
    "src/intarsia/ops",
    (
        "a window one token too wide",
        "attention_torch.py",
        "seen.triu(S - T - window + 1)",
        "seen.triu(S - T - window)",
        "tests/mixers/test_softmax_oracles.py",
    ),
    (
        "few queries without their sink",
        "attention_torch.py",
        "weights = torch.cat([logits, sink], dim=-1)",
        "weights = torch.cat([logits, sink - 100], dim=-1)",
        f"{PROPERTIES} -k sinks",
    ),
    (
        "keys of sequences in pages that are aligned to the left",
        "keys.py",
        "    places = keys.table.places(numbers, [lengths[n] - size for n in numbers], size)",
        "    places = keys.table.places(numbers, [0 for n in numbers], size)",
        "tests/ops/test_attention.py tests/mixers/test_paged.py",
    ),
    (
        "a forget gate in float32",
        "attention_gated.py",
        ".clamp(min=LEAST_LOG_GATE).double()",
        ".clamp(min=LEAST_LOG_GATE)",
        f"tests/mixers/test_softmax_oracles.py tests/mixers/test_younger_softmax_oracles.py {PROPERTIES} -k fox",
    ),
)

MIXERS = _in(
    "src/intarsia/mixers",
    (
        "an indexer whose loss reaches the model",
        "dsa.py",
        "x, q_input = x.detach(), q_input.detach()",
        "pass",
        "tests/mixers/test_sparse_oracles.py -k reach",
    ),
    (
        "layers that share are told of no choice",
        "dsa.py",
        "HandedOn(handed.values, True, picked)",
        "HandedOn(handed.values, True, None)",
        "tests/mixers/test_sparse_oracles.py -k shares",
    ),
    (
        "MLA with another scale",
        "mla.py",
        "scale, largest = c.scale, None",
        "scale, largest = c.nope_dim**-0.5, None",
        "tests/mixers/test_transformers.py -k mla",
    ),
    (
        "a share of values the wrong way round",
        "rwkv7.py",
        "v + share * (first.values - v)",
        "first.values + share * (v - first.values)",
        "tests/mixers/test_dplr_oracles.py",
    ),
    (
        "no negative eigenvalues",
        "gated_deltanet.py",
        "self.beta_max = 2 if config.negative_eigenvalues else 1",
        "self.beta_max = 1",
        "tests/mixers/test_delta_oracles.py tests/mixers/test_transformers.py",
    ),
    (
        "Mamba-2 without its step size at the input",
        "mamba2.py",
        "(v * dt[..., None]).to(v.dtype)",
        "v",
        "tests/mixers/test_state_space_oracles.py",
    ),
    (
        "Mamba-2's step size without limits",
        "mamba2.py",
        ".clamp(self.config.dt_min, self.config.dt_max)",
        "",
        "tests/mixers/test_state_space_oracles.py",
    ),
    (
        "GLA without its temperature",
        "gla.py",
        " / self.config.tau",
        "",
        "tests/mixers/test_additive_oracles.py",
    ),
    (
        "RWKV-7 with another least decay",
        "rwkv7.py",
        "g = -math.exp(-0.5) *",
        "g = -math.exp(-0.4) *",
        "tests/mixers/test_dplr_oracles.py",
    ),
    (
        "RWKV-7 whose bonus reads the raw key",
        "rwkv7.py",
        "(widen(r) * self.bonus * written)",
        "(widen(r) * self.bonus * k)",
        "tests/mixers/test_dplr_oracles.py",
    ),
    (
        "PaTH without the maps of the own chunk",
        "path.py",
        "own = q @ k.mT - upto_query @ before_key",
        "own = q @ k.mT",
        "tests/mixers/test_younger_softmax_oracles.py",
    ),
    (
        "PaTH in bfloat16",
        "path.py",
        "heads_first = [widen(x).transpose(1, 2) for x in (q, k, w, beta)]",
        "heads_first = [widen(x.bfloat16()).to(q.dtype).transpose(1, 2) for x in (q, k, w, beta)]",
        f"{PROPERTIES} -k budget",
    ),
)

MODEL = _in(
    "src/intarsia/model",
    (
        "routing weights with the bias in them",
        "experts.py",
        '(biased if config.routing_weights == "biased" else scores).gather',
        "biased.gather",
        "tests/model/test_experts.py tests/model/test_transformers_experts.py",
    ),
    (
        "experts without their factor",
        "experts.py",
        "weights * config.routed_scaling_factor",
        "weights",
        "tests/model/test_experts.py tests/model/test_transformers_experts.py",
    ),
    (
        "shared experts without their gate",
        "experts.py",
        "torch.sigmoid(self.shared_gate(x)) * shared",
        "shared",
        "tests/model/test_experts.py tests/model/test_transformers_experts.py",
    ),
    (
        "a group's strength by one expert",
        "experts.py",
        "grouped.topk(2, dim=-1)",
        "grouped.topk(1, dim=-1)",
        "tests/model/test_experts.py tests/model/test_transformers_experts.py",
    ),
    (
        "a cost with two matrices an expert",
        "experts.py",
        "expert, router = config.matrices * width * config.d_hidden",
        "expert, router = 2 * width * config.d_hidden",
        "tests/model/test_cost.py",
    ),
    (
        "router biases that move the wrong way",
        "language_model.py",
        "(load.mean() - load).sign()",
        "(load - load.mean()).sign()",
        "tests/model/test_language_model.py -k router_bias",
    ),
    (
        "a gradient at the target in another block",
        "loss.py",
        "targets[rows] - columns.start, gradient[rows]",
        "targets[rows], gradient[rows]",
        "tests/model/test_loss.py",
    ),
    (
        "ignored tokens that count",
        "loss.py",
        "torch.cat(likelihoods).masked_fill(ignored, 0), torch",
        "torch.cat(likelihoods), torch",
        "tests/model/test_loss.py",
    ),
    (
        "a compiled graph for each number of packed sequences",
        "block.py",
        "seqs.filled_up()",
        "seqs",
        "tests/model/test_compiled_blocks.py -k right",
    ),
    (
        "a feed-forward without its gate",
        "feed_forward.py",
        "limited_swiglu(self.gate(x), self.up(x), self.limit)",
        "limited_swiglu(self.gate(x), self.gate(x), self.limit)",
        "tests/model/test_feed_forward.py",
    ),
    (
        "residual outputs as large as others",
        "initialization.py",
        "values.div_(math.sqrt(2 * depth))",
        "values.div_(1)",
        "tests/model/test_initialization.py",
    ),
    (
        "one random stream for all parameters",
        "initialization.py",
        'f"{seed}:{name}".encode()',
        'f"{seed}".encode()',
        "tests/model/test_initialization.py",
    ),
    (
        "groups of layers that never begin anew",
        "attention_residuals.py",
        "        if self.begins:",
        "        if False:",
        "tests/model/test_attention_residuals.py",
    ),
    (
        "a clamped activation that adds nothing to up",
        "feed_forward.py",
        "return (up + 1) * gate * torch.sigmoid(config.sharpness * gate)",
        "return up * gate * torch.sigmoid(config.sharpness * gate)",
        "tests/model/test_feed_forward.py",
    ),
    (
        "streams mixed by the transposed matrix",
        "hyper_connections.py",
        "shares.mT @ wide",
        "shares @ wide",
        "tests/model/test_hyper_connections.py",
    ),
    (
        "a residual scale that is forgotten",
        "block.py",
        'self.placement == "before" else self.residual_scale * h) + y',
        'self.placement == "before" else h) + y',
        "tests/model/test_norm_placement.py",
    ),
)

DATA = _in(
    "src/intarsia/data",
    (
        "a digest without the targets",
        "loader.py",
        "        digest.update(targets.tobytes())\n",
        "",
        "tests/data/test_packing.py",
    ),
    (
        "a digest without the tokens",
        "loader.py",
        "        digest.update(tokens.tobytes())\n",
        "",
        "tests/data/test_packing.py",
    ),
    (
        "bytes of a piece rounded by themselves",
        "loader.py",
        "total * segment.stop // length - total * segment.start // length",
        "total * (segment.stop - segment.start) // length",
        "tests/data/test_packing.py",
    ),
    (
        "each epoch in the same order",
        "packing.py",
        "_shuffled(len(self._lengths), self._seed, epoch, 0)",
        "_shuffled(len(self._lengths), self._seed, 0, 0)",
        "tests/data/test_packing.py",
    ),
    (
        "documents that begin anew in each row",
        "packing.py",
        "done = int(self._lengths[document]) - (int(ends[index]) - start)",
        "done = 0",
        "tests/data/test_packing.py",
    ),
)

TRAINING = _in(
    "src/intarsia/training",
    (
        "the model's gradient clips that of indexers",
        "learner.py",
        "for parameters in (rest, indexers))",
        "for parameters in (rest, rest + indexers))",
        "tests/training/test_indexers.py -k moves",
    ),
    (
        "a run that begins with no other model's weights",
        "start_or_resume.py",
        "beginning.fill(trainer.model)",
        "pass",
        "tests/training/test_sparsify.py -k anywhere",
    ),
    (
        "a warm-up that begins at zero",
        "schedule.py",
        "return (step + 1) / config.warmup_steps",
        "return step / config.warmup_steps",
        "tests/training/test_schedule.py",
    ),
    (
        "a decay one step too early",
        "schedule.py",
        "left = steps - step",
        "left = steps - step - 1",
        "tests/training/test_schedule.py",
    ),
    (
        "Muon that does not look ahead",
        "muon.py",
        "torch._foreach_add(gradients, velocities, alpha=momentum)",
        "torch._foreach_mul(velocities, 1.0)",
        "tests/training/test_muon.py",
    ),
    (
        "Muon with the rate of the rows alone",
        "muon.py",
        "max(rows // fused, columns) ** 0.5",
        "(rows // fused) ** 0.5",
        "tests/training/test_muon.py",
    ),
    (
        "Muon that decays by itself and not by the rate",
        "muon.py",
        "1 - lr * weight_decay",
        "1 - weight_decay",
        "tests/training/test_muon.py",
    ),
    (
        "loads of the last micro-batch alone",
        "learner.py",
        "before.merged(told.detached())",
        "told.detached()",
        "tests/training/test_learner.py -k routers",
    ),
    (
        "copies of weights that are made once",
        "learner.py",
        "            self._narrowed.refresh()\n",
        "",
        "tests/training/test_narrow.py",
    ),
    (
        "a step that waits for its loss",
        "learner.py",
        "return processes.sum(nll), side",
        "float(nll)\n        return processes.sum(nll), side",
        "tests/training/test_waiting.py",
    ),
    (
        "gradients that are not clipped",
        "learner.py",
        "if self.config.grad_clip is not None:",
        "if self.config.grad_clip is None:",
        "tests/training/test_learner.py",
    ),
    (
        "nats for bits",
        "evaluate.py",
        "self.nll.sum() / math.log(2) / self.text_bytes.sum()",
        "self.nll.sum() / self.text_bytes.sum()",
        "tests/training/test_evaluate.py",
    ),
    (
        "a bigram without interpolation",
        "baselines.py",
        "(both + kinds * p[targets]) / np.maximum(total + kinds, 1)",
        "(both + kinds * p[targets]) / np.maximum(total, 1)",
        "tests/training/test_evaluate.py",
    ),
)

EXAMS = _in(
    "src/intarsia/tasks",
    (
        "answers of a sequence that count as independent",
        "exam.py",
        "independent = min(total, share * (1 - share) / scatter) if scatter else total",
        "independent = total",
        "tests/tasks/test_exam.py",
    ),
    (
        "answers that are not numbers and are right",
        "score.py",
        "right &= ~answers.isnan().any(-1)",
        "pass",
        "tests/tasks/test_score.py",
    ),
)

LADDER = _in(
    "src/intarsia/ladder",
    (
        "the worst rate of an exam",
        "results.py",
        "return -score.token_accuracy, -score.sequence_accuracy, self.exam.steps",
        "return score.token_accuracy, -score.sequence_accuracy, self.exam.steps",
        "tests/ladder/test_exams.py",
    ),
    (
        "runs that diverged and are left out of an exam",
        "results.py",
        "found[run.seed] = (0.0, 0.0)",
        "pass",
        "tests/ladder/test_exams.py",
    ),
    (
        "a biased variance of seeds",
        "scatter.py",
        "float(values.var(ddof=1))",
        "float(values.var(ddof=0))",
        "tests/ladder/test_statistics.py",
    ),
    (
        "intervals that are not simultaneous",
        "statistics.py",
        "1 - (1 - confidence) / comparisons",
        "confidence",
        "tests/ladder/test_statistics.py",
    ),
    (
        "a degree of freedom too many",
        "scatter.py",
        "Scatter(float(values.var(ddof=1)), len(values) - 1)",
        "Scatter(float(values.var(ddof=1)), len(values))",
        "tests/ladder/test_statistics.py",
    ),
    (
        "a pooled noise of one run for that of a difference",
        "scatter.py",
        "Scatter(2 * self.variance, self.degrees, pooled=True)",
        "Scatter(self.variance, self.degrees, pooled=True)",
        "tests/ladder/test_scatter.py",
    ),
    (
        "a rate at the end of the loser's grid that weakens nothing",
        "pairs.py",
        "doubted = (*_edge(higher), *_lossy",
        "doubted = (*_edge(lower), *_lossy",
        "tests/ladder/test_verdict.py",
    ),
    (
        "the worse arm is called better",
        "pairs.py",
        'outcome = "better" if lower is a else "worse"',
        'outcome = "worse" if lower is a else "better"',
        "tests/ladder/test_verdict.py",
    ),
    (
        "runs of other documents are taken for done",
        "run_spec.py",
        'UNDECISIVE = ("dataset", "device", "branches_from")',
        'UNDECISIVE = ("dataset", "device", "branches_from", "documents")',
        "tests/ladder/test_run_folder.py",
    ),
    (
        "runs of other training are taken for done",
        "run_spec.py",
        'UNDECISIVE = ("dataset", "device", "branches_from")',
        'UNDECISIVE = ("dataset", "device", "branches_from", "train")',
        "tests/ladder/test_run_folder.py",
    ),
    (
        "as many jobs as there are cores, whatever the memory",
        "capacity.py",
        "int(available_memory() * 0.7 // max(bytes_of_runs))",
        "runs",
        "tests/ladder/test_capacity.py",
    ),
)

INFERENCE = _in(
    "src/intarsia/inference",
    (
        "top-p without the token that crosses it",
        "sampling.py",
        "before = ordered.cumsum(-1) - ordered",
        "before = ordered.cumsum(-1)",
        "tests/inference/test_sampling.py",
    ),
    (
        "min-p of one",
        "sampling.py",
        'column("min_p") * probabilities.amax(-1, keepdim=True)',
        'column("min_p")',
        "tests/inference/test_sampling.py",
    ),
    (
        "a snapshot found before the text leaves it",
        "prefix_tree.py",
        "return snapshot is not None and (snapshot.tokens < length or snapshot.logits is not None)",
        "return snapshot is not None",
        "tests/inference/test_prefix_tree.py",
    ),
    (
        "a guess that counts without being right",
        "engine.py",
        "right == len(guesses) or guesses[right] != token",
        "right == len(guesses)",
        "tests/inference/test_engine.py -k guessing",
    ),
    (
        "a state that keeps what was guessed wrong",
        "engine.py",
        "        elif right == len(part.guesses):\n",
        "        elif right:\n",
        "tests/inference/test_engine.py -k guessing",
    ),
    (
        "texts that make way and keep their count of tokens",
        "engine.py",
        "text.slot, text.seen, text.ready = None, 0, None",
        "text.slot, text.ready = None, None",
        "tests/inference/test_engine.py -k make_way",
    ),
    (
        "no state where texts part",
        "engine.py",
        "            if found.known > found.tokens:\n",
        "            if found.known > found.tokens > 0:\n",
        "tests/inference/test_prefix_cache.py",
    ),
    (
        "a prompt whose pieces forget each other",
        "generate.py",
        "        self.states = out.states\n",
        "        self.states = self.states.snapshot()\n",
        "tests/inference/test_generate.py",
    ),
)

CHECKPOINTS = _in(
    "src/intarsia/checkpoints",
    (
        "scales of the first rows for all pieces",
        "float8.py",
        "torch.arange(first, first + numbers.shape[-2], device=scales.device)",
        "torch.arange(numbers.shape[-2], device=scales.device)",
        "tests/checkpoints/test_float8.py",
    ),
    (
        "numbers of four bits with the high bits first",
        "mxfp4.py",
        "torch.stack([blocks & 15, blocks >> 4], dim=-1)",
        "torch.stack([blocks >> 4, blocks & 15], dim=-1)",
        "tests/checkpoints/test_kimi_k3.py",
    ),
    (
        "decays that fall from the first layer on",
        "families/ling_lightning.py",
        "decay_from=1,",
        "decay_from=0,",
        "tests/checkpoints/test_ling.py",
    ),
    (
        "a window that is not counted beside the chosen blocks",
        "families/minicpm_sala.py",
        'chosen = inside.get("topk", int, 64) + window // block',
        'chosen = inside.get("topk", int, 64)',
        "tests/checkpoints/test_sala.py",
    ),
    (
        "pools of another size than the file says",
        "families/glm5_next.py",
        'options.get("index_kpool", int, 16)',
        "16",
        "tests/checkpoints/test_sparse.py",
    ),
    (
        "sparse layers that are dense unasked",
        "options.py",
        'if self.sparse == "published":',
        'if self.sparse == "never":',
        "tests/checkpoints/test_sparse.py",
    ),
)

CXX = _in(
    "csrc",
    (
        "the norm's mean over the padding too",
        "norm_kernels.cpp",
        "(squares[2] + squares[3])) / R(V);",
        "(squares[2] + squares[3])) / R(width);",
        "tests/ops/test_gated_norm.py",
    ),
    (
        "the norm's gradient along itself",
        "norm_kernels.cpp",
        "const R mean = inverse * (sum<R>(along) / R(V));",
        "const R mean = (sum<R>(along) / R(V));",
        "tests/ops/test_gated_norm.py",
    ),
    (
        "an activation whose gate has the sigmoid's derivative",
        "swiglu_kernels.cpp",
        "d_y * up * silu_derivative<R>(gate, s)",
        "d_y * up * s.derivative()",
        "tests/ops/test_swiglu.py",
    ),
    (
        "a softmax whose gradient has no target",
        "softmax_kernels.cpp",
        "(likelihood[0] - R(1)) * gradient",
        "likelihood[0] * gradient",
        "tests/ops/test_softmax.py",
    ),
    (
        "a convolution with a tap too few",
        "conv_kernels.cpp",
        "for (int w = 1; w < taps(); w++) p[i] += load(past[i + w] + d)",
        "for (int w = 1; w + 1 < taps(); w++) p[i] += load(past[i + w] + d)",
        "tests/ops/test_conv.py",
    ),
    (
        "a chunk's total decay of its first block",
        "chunk.h",
        "store<R>(c.total + d, before * load(c.block_totals + a * K + d));",
        "store<R>(c.total + d, before);",
        "tests/ops/test_linear.py -k cpu",
    ),
    (
        "keys that decay one token too little inside a block",
        "chunk.h",
        "for (int w = 0; w < WIDTH; w++) carried[w] *= load(alpha + i * K + w * N);",
        "for (int w = 0; w < WIDTH; w++) carried[w] *= load(alpha + (i - 1) * K + w * N);",
        "tests/ops/test_linear.py -k cpu",
    ),
    (
        "a bounded gate without its bound",
        "chunk.h",
        "sigmoid<R>(g * R(task.rate)) * R(task.bound)",
        "sigmoid<R>(g * R(task.rate)) * R(-1)",
        "tests/ops/test_linear.py -k cpu",
    ),
    (
        "a decay's gradient without what flows across it",
        "backward.h",
        "        across[i] += flows;\n",
        "",
        "tests/ops/test_linear.py -k cpu",
    ),
    (
        "a step that does not divide keys by their length",
        "decode_kernels.cpp",
        "return sum<R>(sums[2]) * of_q * of_k;",
        "return sum<R>(sums[2]) * of_q;",
        "tests/ops/test_decode.py -k cpu",
    ),
    (
        "a step whose beta stays below one",
        "decode_kernels.cpp",
        "to[t] = sigmoid<R>(splat<R>(to[t]))[0] * R(layer.beta_scale);",
        "to[t] = sigmoid<R>(splat<R>(to[t]))[0];",
        "tests/ops/test_decode.py -k cpu",
    ),
    (
        "segments of time whose states do not add up",
        "split.cpp",
        "B + task_.V * bytes_, int(width_), state(i), state(i + 1), wide_);",
        "B + task_.V * bytes_, int(width_), state(1), state(i + 1), wide_);",
        "tests/ops/test_split.py",
    ),
)

MUTANTS = (
    *OPS,
    *LAYERS,
    *ATTENTION,
    *MIXERS,
    *MODEL,
    *DATA,
    *TRAINING,
    *EXAMS,
    *LADDER,
    *INFERENCE,
    *CHECKPOINTS,
    *CXX,
)
