"""What every token mixer is: a module with state in and out, a configuration and a stated cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar, get_args

from torch import Tensor, nn

from intarsia.errors import ConfigError, OptionError, ShapeError
from intarsia.layers.books import PAGE_SIZE, Books
from intarsia.layers.convolution import ShortConvolution
from intarsia.layers.cost import Cost, Entries
from intarsia.layers.filling import FillsItself, GeneratorOf
from intarsia.layers.norm import OutputGate
from intarsia.layers.pools import Pool
from intarsia.layers.side import SideName, SideResults
from intarsia.layers.states import State
from intarsia.ops.linear_call import Decay
from intarsia.ops.sequences import Sequences
from intarsia.settings import settle_types

__all__ = [
    "About",
    "Cost",
    "Family",
    "GeneratorOf",
    "GroupedHeadsConfig",
    "HandedOn",
    "HeadsConfig",
    "Layer",
    "Memory",
    "Mixer",
    "MixerConfig",
    "MixerOutput",
    "NormedConfig",
    "check_output_gate",
    "check_value_heads",
    "positive",
]

S = TypeVar("S", bound=State)
MixerOutput = (
    tuple[Tensor, S | None]
    | tuple[Tensor, S | None, SideResults]
    | tuple[Tensor, S | None, "HandedOn"]
    | tuple[Tensor, S | None, SideResults, "HandedOn"]
)

Layer = Callable[[Tensor, S | None, Sequences | None], tuple[Tensor, S | None]]
"""What computes a mixer's `forward`: the mixer, or what it becomes for inference."""


class HandedOn(NamedTuple):
    """What layers hand on to later ones that need it."""

    values: Tensor | None = None
    """The values `[B, T, HV, V]` of the first layer that mixes later ones with them; None before it."""
    indexed: bool = False
    """Whether a layer has chosen which tokens are read, for later ones too."""
    picked: Tensor | None = None
    """What the last one of them picked, as `lightning_indexer` has it; None: everything."""


class Memory(Protocol[S]):
    """What a mixer remembers of one sequence, in shapes; dtype and device follow `like`, a weight of the mixer."""

    def entries(self, like: Tensor) -> tuple[Entries, ...]:
        """What it keeps of the tokens, by kind, besides what has a fixed size."""
        ...

    def new_state(self, count: int, like: Tensor) -> S: ...

    def new_pool(self, books: Books, tokens: int, like: Tensor) -> Pool[S]: ...


class Mixer(FillsItself, Generic[S]):
    """A layer that lets tokens exchange information.

    `y, state = mixer(x, state=None, seqs=None)` with `x` and `y` `[B, T, D]`. Without a state the sequences
    start from nothing and no state is returned, which is what training wants; `init_state` gives the empty
    state to start a generation from. `seqs` says where sequences begin in a packed row (`B == 1`). With both, the
    row holds what comes next of each of the state's sequences; one that brings no token keeps its state.

    A mixer that lists `side_results` takes the names of some as a fourth argument `side`, and returns them third then;
    one that `hands_on` takes what earlier layers handed on as `handed`, and returns it last, with its own.

    A new one can be used as it is: matrices begin as PyTorch's linear maps do, everything else as its paper says.
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("o_proj",)
    """The linear maps that write to the residual stream: their initial weights are smaller."""
    side_results: tuple[SideName, ...] = ()
    """What it can tell beside its output."""
    reads_weights: ClassVar[tuple[str, ...]] = ()
    """The linear maps whose weights it reads itself, which therefore cannot be packed for inference."""

    untrained: ClassVar[tuple[str, ...]] = ()
    """The parts of it that no gradient of its output reaches."""
    hands_on: bool = False
    """Whether it takes what earlier layers have for later ones as `handed`, and adds its own."""
    takes_handed: bool = False
    """Whether it cannot do without."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(self, x: Tensor, state: S | None = None, seqs: Sequences | None = None) -> MixerOutput[S]:
        raise NotImplementedError

    @property
    def memory(self) -> Memory[S]:
        """What it remembers of a sequence."""
        raise NotImplementedError

    def init_state(self, batch_size: int) -> S:
        """The state of `batch_size` sequences that have not begun."""
        return self.memory.new_state(batch_size, next(self.parameters()))

    def new_pool(self, slots: int, tokens: int = 0, page_size: int = PAGE_SIZE) -> Pool[S]:
        """Room for the states of `slots` sequences, which go on in place; and, where states grow, for `tokens` tokens
        of all of them together, in pages of `page_size`."""
        return self.pool_in(Books(slots, page_size), tokens)

    def pool_in(self, books: Books, tokens: int) -> Pool[S]:
        """The same for a layer that shares its slots and pages with others."""
        return self.memory.new_pool(books, tokens, next(self.parameters()))

    def for_inference(self) -> Layer[S]:
        """What computes the same as the mixer where nothing is trained, with what can be made once made now: another
        one is needed when weights have changed."""
        return self

    def mixing_flops(self, length: int) -> float:
        """FLOPs per token of the exchange between tokens, averaged over a sequence of `length`."""
        raise NotImplementedError

    def cost(self) -> Cost:
        """Parameters, FLOPs and state bytes."""
        weights = [m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear | ShortConvolution)]
        return Cost(
            parameters=sum(p.numel() for p in self.parameters()),
            projection_flops=2 * sum(weights),
            mixing_flops=self.mixing_flops,
            fixed_state_bytes=self.init_state(1).nbytes(),
            entries=self.memory.entries(next(self.parameters())),
        )

    def check_input(self, x: Tensor, state: S | None, seqs: Sequences | None) -> None:
        """Raise ShapeError unless the arguments of `forward` fit together."""
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ShapeError(f"{type(self).__name__} takes [B, T, {self.d_model}]; got {list(x.shape)}")
        if x.shape[1] == 0:
            raise ShapeError(f"{type(self).__name__} needs at least one token; got {list(x.shape)}")
        if seqs is not None and (x.shape[0] != 1 or x.shape[1] != seqs.total):
            raise ShapeError(f"seqs describes [1, {seqs.total}, D]; got {list(x.shape)}")
        if state is not None:
            count = x.shape[0] if seqs is None else seqs.count
            if state.count != count:
                raise ShapeError(f"the state is of {state.count} sequences and the input of {count}")


Family = Literal["additive", "delta", "softmax", "convolution"]


@dataclass(frozen=True)
class About:
    """What the table of mixers tells of one."""

    title: str
    year: int
    source: str
    """Where it was published: `arXiv:…` where it is there."""
    family: Family
    """What a token does to the memory: adds to it, also erases from it, keeps every token to look at, or keeps the last
    few."""
    equation: str
    """The update rule in ASCII, in the notation of the operators: S the state, g the log-decay, b beta."""
    brought: str
    """What it fixed or brought, in a sentence."""
    operator: str
    """What computes the exchange between tokens: `linear_attention`, `gated_delta_rule`, `dplr_rule`,
    `softmax_attention`, `short_convolution`, or a name of its own."""
    example: Mapping[str, Any]
    """Options of a common size (width 1024, where possible 8 heads of 128), for tables of cost."""
    decay: Decay = "none"
    """What the memory fades by: nothing, a fixed factor of each head, or one that each token chooses for each head or
    for each channel."""


@dataclass(frozen=True)
class MixerConfig:
    """The options of a mixer. Subclasses are frozen dataclasses of JSON-able fields.

    The fields' types are checked when a configuration is made. A subclass that has a `__post_init__` of its own calls
    this one first.
    """

    type: ClassVar[str]
    """The name in the registry and in the layout."""
    about: ClassVar[About]

    def __post_init__(self) -> None:
        settle_types(self)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> Mixer[Any]:
        """The mixer for a model of width `d_model`."""
        raise NotImplementedError

    def at_layer(self, layer: int, depth: int) -> MixerConfig:
        """The options in layer `layer` (from 0) of `depth`, for mixers that differ from layer to layer."""
        return self

    @classmethod
    def example(cls) -> MixerConfig:
        """The mixer in the common size of the tables."""
        return cls(**cls.about.example)


@dataclass(frozen=True)
class NormedConfig(MixerConfig):
    """The options of a mixer that has norms: `norm_eps` is their epsilon where it is not the model's."""

    norm_eps: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(norm_eps=self.norm_eps)

    def own_eps(self, norm_eps: float) -> float:
        """The epsilon of the mixer's norms in a model whose own is `norm_eps`."""
        return norm_eps if self.norm_eps is None else self.norm_eps


@dataclass(frozen=True)
class HeadsConfig(MixerConfig):
    """`num_heads` heads, with `head_dim` channels of queries and keys (K) and `head_v_dim` of values (V; K by
    default)."""

    num_heads: int
    head_dim: int
    head_v_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(num_heads=self.num_heads, head_dim=self.head_dim, head_v_dim=self.head_v_dim)

    @property
    def value_dim(self) -> int:
        """V."""
        return self.head_dim if self.head_v_dim is None else self.head_v_dim


@dataclass(frozen=True)
class GroupedHeadsConfig(MixerConfig):
    """`num_heads` query and key heads of `head_dim` (K), and `num_v_heads` value heads (a multiple; the same number by
    default) of `head_v_dim` (V; K by default)."""

    num_heads: int
    head_dim: int
    num_v_heads: int | None = None
    head_v_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            num_v_heads=self.num_v_heads,
            head_v_dim=self.head_v_dim,
        )
        check_value_heads(self.value_heads, self.num_heads)

    @property
    def value_heads(self) -> int:
        """HV."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def value_dim(self) -> int:
        """V."""
        return self.head_dim if self.head_v_dim is None else self.head_v_dim


def positive(**values: int | float | None) -> None:
    """Raise OptionError for the first value that is given and not above zero."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise OptionError(f"must be positive; got {value}", (name,))


def check_value_heads(value_heads: int, num_heads: int) -> None:
    """Raise ConfigError unless each query-key head has the same number of value heads."""
    if value_heads % num_heads:
        raise ConfigError(f"num_v_heads must be a multiple of num_heads={num_heads}; got {value_heads}")


def check_output_gate(gate: str) -> None:
    """Raise ConfigError unless there is such an output gate."""
    if gate not in get_args(OutputGate):
        raise ConfigError(f"output_gate must be 'sigmoid', 'swish' or 'none'; got {gate!r}")
