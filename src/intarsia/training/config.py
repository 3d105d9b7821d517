"""What a training run is: one frozen dataclass."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from intarsia.errors import ConfigError, OptionError
from intarsia.settings import check_bounds, read, settle_types

OptimizerName = Literal["muon", "adamw"]
ScheduleName = Literal["wsd", "cosine", "constant"]
Precision = Literal["float32", "bf16"]
MuonPrecision = Literal["auto", "float32", "bf16"]
Trains = Literal["all", "indexers"]

FREE_FIELDS = frozenset(
    {
        "micro_rows",
        "activation_checkpointing",
        "compile",
        "log_every",
        "eval_every",
        "eval_documents",
        "eval_bytes",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "keep_stable",
        "tensorboard",
    }
)
"""Fields that may change between a run and its resumption: how much memory a step takes, what is measured, shown and
kept. They change no mathematics (micro_rows and compile change the rounding)."""
SCHEDULE_FIELDS = frozenset({"steps", "schedule", "warmup_steps", "decay_fraction", "final_lr_fraction"})
"""Fields that decide the learning rate of each step. A run may go on with others where they would have given the steps
that are done the rates that they had: so it may become longer before its rate has begun to fall."""
DATA_FIELDS = frozenset({"rows", "length", "data_seed"})
"""Fields that decide which tokens come in which step."""
LASTING_FIELDS = DATA_FIELDS | {"seed", "optimizer"}
"""Fields that are the same in a run and in all that branch off from it: the order of the data, and what the
checkpoint's tensors mean."""

BOUNDS: tuple[tuple[tuple[str, ...], dict[str, float]], ...] = (
    (("steps", "rows", "length", "log_every", "keep_checkpoints"), {"least": 1}),
    (("micro_rows", "eval_every", "eval_bytes", "checkpoint_every", "keep_every"), {"least": 1}),
    (("eval_documents", "warmup_steps", "seed", "data_seed", "weight_decay"), {"least": 0}),
    (("lr", "adamw_lr_scale", "adamw_eps", "grad_clip", "qk_clip"), {"above": 0}),
    (("decay_fraction", "final_lr_fraction"), {"least": 0, "most": 1}),
    (("muon_momentum", "adamw_betas"), {"least": 0, "below": 1}),
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run, besides the model and the data.

    A step reads `rows` rows of `length` tokens over all processes together. How they are cut into forward
    passes (`micro_rows`) and divided among processes changes the rounding and nothing else: the loss of a
    step is the mean over all its tokens.
    """

    steps: int
    """Optimizer steps."""
    rows: int = 16
    """Rows of a step, over all processes."""
    length: int = 512
    """Tokens of a row. A sequence is never longer."""
    micro_rows: int | None = None
    """Rows of one forward pass of one process. None: all of the process's rows at once."""

    trains: Trains = "all"
    """"indexers": only the indexers of sparse attention, all else frozen."""
    optimizer: OptimizerName = "muon"
    """"muon": Muon for the weight matrices, AdamW for the rest. "adamw": AdamW for everything."""
    lr: float = 2e-3
    """Peak learning rate. Muon's updates are scaled to AdamW's, so both are used to the same values."""
    adamw_lr_scale: float = 1.0
    """Multiplies `lr` for the parameters that AdamW trains beside Muon."""
    weight_decay: float = 0.1
    """Decoupled, multiplied by the learning rate; for matrices, experts, the router and an untied head."""
    muon_momentum: float = 0.95
    muon_precision: MuonPrecision = "auto"
    """Of the Newton–Schulz iteration. "auto": bf16 where the device multiplies it in hardware."""
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    adamw_eps: float = 1e-8
    grad_clip: float | None = 1.0
    """Largest norm of the gradient of all parameters together; of those of indexers, which have a loss of their own,
    apart. None: not clipped."""
    qk_clip: float | None = None
    """Largest attention logit that softmax layers are allowed (MuonClip; Kimi K2 used 100). None: not
    clipped."""

    schedule: ScheduleName = "wsd"
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    """WSD: the share of the steps in which the learning rate falls."""
    final_lr_fraction: float = 0.0
    """WSD and cosine: the learning rate at the end, as a fraction of the peak."""

    precision: Precision = "float32"
    """"bf16": autocast. Weights, optimizer state, reductions and what the layers ask for stay float32."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping its activations."""
    compile: bool = False
    """Let torch.compile compute the blocks (`LanguageModel.compile_blocks`): fewer and larger kernels, after a minute
    or more of compiling at the start. Needs a C++ compiler on CPUs, Triton on GPUs."""
    seed: int = 0
    """Of the initial weights."""
    data_seed: int = 0
    """Of the order of the documents."""

    log_every: int = 10
    """Steps between two lines of metrics."""
    eval_every: int | None = None
    """Steps between evaluations. None: at the end alone."""
    eval_documents: int | None = None
    """Evaluate on the first so many held-out documents. None: all that `eval_bytes` allows. 0: never
    evaluate."""
    eval_bytes: int | None = None
    """Evaluate on the first held-out documents of so many bytes of text together. None: no such limit."""
    checkpoint_every: int | None = None
    """Steps between checkpoints. None: none but the one that an interruption writes."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    keep_every: int | None = None
    """Keep the checkpoints of all steps that are multiples of this as well. None: none of them."""
    keep_stable: bool = False
    """Write a checkpoint where the learning rate begins to fall, and keep it: the one from which a longer run, or one
    with another decay, goes on. With a constant rate that is the end; a cosine falls from the start and has none."""
    tensorboard: bool = False
    """Write TensorBoard events as well (needs the extra `tensorboard`)."""

    def __post_init__(self) -> None:
        settle_types(self)
        for names, bounds in BOUNDS:
            check_bounds(self, *names, **bounds)
        if self.warmup_steps >= self.steps:
            raise OptionError(
                f"must be fewer than steps ({self.steps}); got {self.warmup_steps}",
                ("warmup_steps",),
            )
        if self.trains == "indexers" and self.qk_clip is not None:
            raise OptionError(
                "changes the layers that trains='indexers' leaves as they are: set it to null", ("qk_clip",)
            )
        if self.micro_rows is not None and self.rows % self.micro_rows:
            raise OptionError(f"must divide rows ({self.rows}); got {self.micro_rows}", ("micro_rows",))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, over all processes."""
        return self.rows * self.length

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.tokens_per_step

    def rows_per_rank(self, world_size: int) -> int:
        """The rows of a step that each of `world_size` processes reads.

        Raises:
            ConfigError: the rows cannot be divided among the processes, or not into micro-batches.
        """
        if self.rows % world_size:
            raise ConfigError(
                f"rows ({self.rows}) must be a multiple of the number of processes ({world_size})"
            )
        rows = self.rows // world_size
        if self.micro_rows is not None and rows % self.micro_rows:
            raise ConfigError(
                f"the rows of each process ({self.rows} / {world_size} = {rows}) must be a multiple of "
                f"micro_rows ({self.micro_rows})"
            )
        return rows

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed."""
        return TrainConfig.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return {**asdict(self), "adamw_betas": list(self.adamw_betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`.

        Raises:
            OptionError: an unknown name, no number of steps, or a value that cannot be right.
        """
        return read(cls, values)
