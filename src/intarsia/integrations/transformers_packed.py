"""Models of transformers made ready to decode on a CPU: their linear maps and experts with packed weights.

Decoding one sequence is reading the weights. So they are packed (`intarsia.ops.pack_weights`) and multiplied by the
products that read each of them once; half the bytes are half the time. The model itself is changed, module by module,
and can be changed back.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError, UnsupportedError
from intarsia.extras import require
from intarsia.integrations.transformers_attention import NAME, register_attention
from intarsia.integrations.transformers_cache import with_room
from intarsia.layers.packed import PackedLinear, Packing, bytes_of_weights, stand_in
from intarsia.ops import PackedWeights, packed_linear
from intarsia.ops.packed_weights import FLOATING, WeightFormat

BACK = (
    "call `.undo()` of what `prepare_for_inference` returned, which gives the trainable model back; where that was not"
    " kept, load the model anew"
)

DTYPES = (torch.float32, torch.bfloat16)


def prepare_for_inference(
    model: nn.Module,
    weights: WeightFormat | None = None,
    *,
    group: int | None = None,
    zeros: bool = False,
    attention: bool = True,
) -> PreparedModel:
    """Let a model of transformers decode with packed weights and Intarsia's attention, until it is undone.

    Linear maps (`nn.Linear`, that type and no other) and experts on the CPU are replaced in the model itself, in
    evaluation mode; hooks, devices, dtypes and names stay. The parameter `weight` that remains has the shape and dtype
    of the weight, no memory, and NaN for every number. Embeddings stay what they are, also where the head is tied to
    them. `generate` makes caches that append in place (`transformers_cache.with_room`).

    Args:
        model: of transformers, float32 or bfloat16.
        weights: what weights become, `"bfloat16"`, `"int8"`, `"int4"`, ...; with `"int4"` the head is int8. None: as
            they are, which takes no memory. Small weights stay as they are.
        group, zeros: of the integers, as in `pack_weights`.
        attention: whether the model attends by `attn_implementation="intarsia"` where it can.

    Returns:
        A `PreparedModel`, which says what was left alone and why. It keeps the weights that were replaced: where it is
        not kept, they go, and nothing can be undone.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: no model of transformers, one that is prepared already, a format or group that cannot be.
        UnsupportedError: nothing in it can be packed.
    """
    return PreparedModel(model, Packing(weights, group, zeros), attention)


class PreparedModel:
    """A model of transformers that `prepare_for_inference` has changed; a context manager that undoes it at its end.

    Attributes:
        packed: the names of the modules that were replaced.
        left: of linear maps and experts that were not, why.
        attention: whether the model attends by Intarsia's attention now.
    """

    def __init__(self, model: nn.Module, packing: Packing, attention: bool = True) -> None:
        transformers = require("transformers", "hf")
        if not isinstance(model, transformers.PreTrainedModel):
            raise ConfigError(f"a model of transformers is prepared; got {type(model).__name__}")
        if any(isinstance(module, _Packed) for module in model.modules()):
            raise ConfigError(f"the model is prepared already: {BACK}")
        self._model: Any = model
        places, self.left = _places(model, packing)
        if not places:
            reasons = "; ".join(sorted(set(self.left.values()))) or "it has no linear maps"
            raise UnsupportedError(f"nothing in {type(model).__name__} can be packed: {reasons}")
        made = _made(model, places, packing)
        # From here on nothing fails.
        self.packed = tuple(places)
        self._replaced = [(parent, name, getattr(parent, name), new) for parent, name, new in made]
        self._training = [module for module in model.modules() if module.training]
        for parent, name, _, new in self._replaced:
            parent._modules[name] = new
        model.eval()
        guarded: Any = _guarded_class(type(model))  # type: ignore[arg-type]
        model.__class__ = guarded
        self._before = _attend(model) if attention else None
        self.attention = self._before is not None

    @property
    def weight_bytes(self) -> int:
        """What all weights of the model take now, packed ones as they are packed."""
        return bytes_of_weights(() if self._model is None else self._model.modules())

    def undo(self) -> None:
        """Give the trainable model back: the modules, weights and modes that it had. A second time does nothing."""
        model, self._model = self._model, None
        if model is None:
            return
        model.__class__ = type(model).__bases__[1]
        for parent, name, original, new in self._replaced:
            if parent._modules.get(name) is new:  # else somebody replaced it after us: theirs stays
                parent._modules[name] = original
        for module in self._training:
            module.training = True
        if self._before is not None:
            model.set_attn_implementation(self._before)
        self._replaced.clear()

    def __enter__(self) -> PreparedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        if self._model is None:
            return "PreparedModel(undone)"
        return (
            f"PreparedModel({len(self.packed)} modules of {type(self._model).__name__} packed,"
            f" {len(self.left)} left, {self.weight_bytes:,} bytes)"
        )


def _attend(model: Any) -> Any:
    """Let the model attend by our attention, and return how it did; None where it cannot be told."""
    register_attention()
    general = getattr(model, "_supports_sdpa", False) or getattr(model, "_supports_attention_backend", False)
    if not (general and model._can_set_attn_implementation()):
        return None
    before = {"": model.config._attn_implementation}
    for name in model.config.sub_configs:
        if (part := getattr(model.config, name, None)) is not None:
            before[name] = part._attn_implementation
    model.set_attn_implementation(NAME)
    return before


class _Guarded:
    """Mixed into the class of a prepared model: what would go wrong later, or without a word, is refused."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise UnsupportedError(f"packed weights are for inference and cannot be trained: {BACK}")
        return super().train(False)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **options: Any
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        made = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **options)  # type: ignore[misc]
        if given is None:
            with_room(model_kwargs.get("past_key_values"))
        return made

    def save_pretrained(self, *args: Any, **options: Any) -> NoReturn:
        raise UnsupportedError(f"packed weights cannot be saved: {BACK}")

    def push_to_hub(self, *args: Any, **options: Any) -> NoReturn:
        raise UnsupportedError(f"packed weights cannot be saved: {BACK}")

    def resize_token_embeddings(self, *args: Any, **options: Any) -> NoReturn:
        raise UnsupportedError(f"a packed head cannot be resized: {BACK}")


@functools.lru_cache
def _guarded_class(of: type[nn.Module]) -> type[nn.Module]:
    # By the same name, which transformers looks at.
    return type(of.__name__, (_Guarded, of), {"__module__": of.__module__, "__qualname__": of.__qualname__})


class _Packed(nn.Module):
    """What stands in the place of a module whose weights were packed."""

    def all_packed(self) -> tuple[PackedWeights, ...]:
        """Its packed weights."""
        raise NotImplementedError

    def _save_to_state_dict(self, *args: Any) -> NoReturn:
        raise UnsupportedError(f"packed weights have no state_dict: {BACK}")


class _Linear(PackedLinear, _Packed):
    """A linear map of a model of transformers, with packed weights."""

    def forward(self, x: Tensor) -> Tensor:
        _check_grad(x)
        return super().forward(x)


class _Experts(_Packed):
    """Experts of transformers with packed weights: the chosen ones alone are read, and none is copied. Mixed into the
    class of the experts, whose activation and options it uses."""

    names: ClassVar[tuple[str, ...]] = ("gate_up_proj", "up_proj", "down_proj")
    packed_up: PackedWeights
    packed_down: PackedWeights

    def all_packed(self) -> tuple[PackedWeights, ...]:
        return self.packed_up, self.packed_down

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[N, D]`, the chosen experts `[N, k]` int64 and their weights to `[N, D]`."""
        _check_grad(hidden_states)
        (N, D), k = hidden_states.shape, top_k_index.shape[-1]
        chosen = top_k_index.reshape(-1)
        h = packed_linear(hidden_states.repeat_interleave(k, dim=0), self.packed_up, matrix_of_row=chosen)
        if self.has_bias:
            h = h + (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias)[chosen]
        h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
        y = packed_linear(h, self.packed_down, matrix_of_row=chosen)
        if self.has_bias:
            y = y + self.down_proj_bias[chosen]
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        return (y.view(N, k, D) * top_k_weights.view(N, k, 1)).sum(1).to(hidden_states.dtype)


def _check_grad(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise UnsupportedError(
            f"packed weights are for inference and have no gradients: use torch.no_grad(), or to train, {BACK}"
        )


@functools.lru_cache
def _experts_class(of: type[nn.Module]) -> type[nn.Module]:
    return type(f"Packed{of.__name__}", (_Experts, of), {"__module__": __name__})


def _is_experts(module: nn.Module) -> bool:
    """Whether the class of a module was made by `use_experts_implementation`, which says how its weights lie."""
    options = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
    return all(hasattr(module, name) for name in options) and hasattr(module, "down_proj")


def _places(model: Any, packing: Packing) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules to pack by name, and of those that are left why."""
    places: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for path, module in model.named_modules():
        if type(module) is nn.Linear:
            reason = _refusal(module, (module.weight,), packing)
            above, _, name = path.rpartition(".")
            parent = model.get_submodule(above)
            if reason is None and name in _reads(type(parent)):  # type: ignore[arg-type]
                reason = f"{type(parent).__name__} reads its weight itself"
            if reason is None and packing.format not in (None, *FLOATING) and _routes(parent, module):
                reason = "it routes tokens to experts, and stays as it is"
        elif _is_experts(module):
            weights = [getattr(module, name) for name in _Experts.names if hasattr(module, name)]
            reason = _refusal(module, weights, packing)
            if reason is None and module._is_expert_parallel:
                reason = "its experts are divided among processes"
        else:
            continue
        if reason is None:
            places[path] = module
        else:
            left[path] = reason
    return places, left


def _refusal(module: nn.Module, weights: Any, packing: Packing) -> str | None:
    """Why a module cannot be packed, or None."""
    weight = weights[0]
    if "forward" in vars(module):
        return "another library wraps its forward, as device maps with offloading do"
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not float32 or bfloat16"
    if not all(packing.packs(each) for each in weights):
        return "PyTorch multiplies it as fast: it is small, or there are no kernels"
    return None


@functools.lru_cache
def _reads(of: type[nn.Module]) -> frozenset[str]:
    """The names of modules whose weights the code of a class reads, not only their dtype."""
    try:
        code = inspect.getsource(of)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape)\b)", code))


def _routes(parent: nn.Module, module: nn.Linear) -> bool:
    """Whether a linear map scores experts: it stands beside them, and has a row for each."""
    beside = getattr(parent, "experts", None)
    count = getattr(beside, "num_experts", len(beside) if isinstance(beside, nn.ModuleList) else None)
    return count is not None and module.out_features == count


def _made(
    model: Any, places: Mapping[str, nn.Module], packing: Packing
) -> list[tuple[nn.Module, str, nn.Module]]:
    """What stands in the places, each with its parent and name; one for a module that stands in several."""
    # A wrong logit is a wrong token; and the head is read as often as all the rest.
    head = model.get_output_embeddings()
    made: list[tuple[nn.Module, str, nn.Module]] = []
    done: dict[int, nn.Module] = {}
    for module in places.values():
        mine = (
            Packing("int8", least=packing.least) if module is head and packing.format == "int4" else packing
        )
        if id(module) not in done:
            done[id(module)] = (
                _pack_linear(module, mine) if type(module) is nn.Linear else _pack_experts(module, mine)
            )
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and id(child) in done:
                made.append((parent, name, done[id(child)]))
    return made


def _pack_linear(module: nn.Module, packing: Packing) -> nn.Module:
    weight: Tensor = module.weight  # type: ignore[assignment]
    made = _Linear(packing.pack(weight), module.bias, weight.dtype)  # type: ignore[arg-type]
    _take_over(made, module)
    return made


def _pack_experts(module: Any, packing: Packing) -> nn.Module:
    names = [name for name in _Experts.names if isinstance(getattr(module, name, None), nn.Parameter)]
    of: Any = _experts_class(type(module))  # type: ignore[arg-type]
    made = of.__new__(of)
    made.__dict__.update(vars(module))
    made._parameters = dict(module._parameters)
    packed = []
    for name in names:
        weight = getattr(module, name)
        packed.append(packing.pack(weight.mT if module.is_transposed else weight))
        nothing = stand_in(packed[-1], weight.dtype)
        made._parameters[name] = (
            nn.Parameter(nothing.mT, requires_grad=False) if module.is_transposed else nothing
        )
    made.packed_up, made.packed_down = packed
    return made


def _take_over(made: nn.Module, module: nn.Module) -> None:
    """The hooks and whatever else stands in a module."""
    kept = {"_parameters", "_buffers", "_modules", *vars(made)} - {n for n in vars(module) if "hook" in n}
    made.__dict__.update({name: value for name, value in vars(module).items() if name not in kept})
