"""What a merge will do, decided and checked before a weight is read."""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lora_cli.adapters.lowrank import RankChoice
from lora_cli.adapters.reader import OpenAdapter, all_modules
from lora_cli.errors import NothingMatched, Refused, UsageError
from lora_cli.methods import MethodFolder
from lora_cli.records import Coefficients
from lora_cli.steps.serving import VLLM_RANKS, demand_servable

METHODS = MethodFolder("lora_cli.merge_methods", "merge method")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO_RANK = 64
_LARGEST_SCALING = 1e9

Inputs = Callable[[OpenAdapter, str], Tensor]
"""Called as inputs(adapter, module): a sample of what the module is fed while the adapter is worn, (tokens, in)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """A merge that passed every check which needs no weights.

    `adapters` and `weights` are in canonical order, whatever order they were given in. `coefficients`, when there are
    any, replace the weights: per adapter, or per rank of each adapter, module by module.
    """

    adapters: tuple[OpenAdapter, ...]
    weights: tuple[float, ...]
    method: str
    knobs: Mapping[str, Any]
    base: str
    modules: tuple[str, ...]
    scope: tuple[str, ...] = ()
    rank: str = "auto"
    energy: float | None = None
    scaling: float = 1.0
    norm_match: bool = False
    missing: str = "zero"
    dense: bool = False
    serve: str = ""
    dtype: str = "auto"
    device: str = "cpu"
    coefficients: Coefficients | None = None
    inputs: Inputs | None = None

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base stores its weights (in, out). PEFT saves true where it found that; false is its default."""
        return any(adapter.fan_in_fan_out for adapter in self.adapters)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result besides the adapters themselves."""
        return {
            "method": self.method,
            "knobs": dict(self.knobs),
            "base": self.base,
            "weights": {a.ref.pinned: w for a, w in zip(self.adapters, self.weights, strict=True)},
            "scope": list(self.scope),
            "rank": self.rank,
            "energy": self.energy,
            "lambda": self.scaling,
            "norm_match": self.norm_match,
            "missing": self.missing,
            "dense": self.dense,
            "for": self.serve,
            "dtype": self.dtype,
            "device": self.device,
            "coefficients": None if self.coefficients is None else self.coefficients.sha256,
        }

    def rank_choice(self, ranks: Sequence[int]) -> RankChoice:
        """How the rank of a module's result is chosen where its adapters have `ranks`."""
        choice = rank_choice(self.rank, self.energy, ranks)
        if not self.serve or choice.exact:
            return choice
        most = VLLM_RANKS[-1]
        return replace(choice, ceiling=min(choice.ceiling or most, most))


def plan(
    adapters: Sequence[OpenAdapter],
    weights: Sequence[float],
    *,
    base: str,
    method: str = "linear",
    knobs: Mapping[str, Any] | None = None,
    scope: Sequence[str] = (),
    rank: str = "auto",
    energy: float | None = None,
    scaling: float = 1.0,
    norm_match: bool = False,
    missing: str = "zero",
    dense: bool = False,
    serve: str = "",
    dtype: str = "auto",
    device: str = "cpu",
    coefficients: Coefficients | None = None,
    inputs: Inputs | None = None,
) -> MergePlan:
    """Check everything that can be checked before a weight is read.

    Args:
        weights: one per adapter.
        base: the base model that all adapters were found to belong to, as the result will declare it.
        scope: what part of the model is merged, each like "layers=0-15,20" or "modules=q_proj,*.mlp.*"; all must hold.
        rank: a number, "sum" (exact) or "auto" (up to 64, or the largest rank among the adapters if that is more).
        scaling: λ, a factor on the whole result.
        norm_match: scale every module's result to the weighted mean of its adapters' norms.
        missing: "zero" counts an adapter as a zero update in modules it lacks; "renorm" spreads its weight over the
            others there.
        dense: write whole updates, not factors.
        serve: "vllm" gives every module one rank that vLLM accepts; "" is for PEFT.
        device: where the arithmetic is done, as torch names it.
        inputs: where a method that needs inputs finds them.

    Raises:
        UsageError: an unknown method, knob, rank, scope or dtype.
        NothingMatched: no module in the scope.
        Refused: no base, shapes that contradict each other, an adapter given twice, or one that has no module in the
            scope, a device that lacks float64, what the server cannot serve.
    """
    checked = METHODS.check(method, knobs or {})
    if missing not in ("zero", "renorm"):
        raise UsageError(f"--missing is zero or renorm, not {missing!r}")
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"--dtype is auto, {', '.join(DTYPES)}, not {dtype!r}")
    if dense and (rank != "auto" or energy is not None):
        raise UsageError("--dense writes the whole update: it has no rank to choose")
    if serve not in ("", "vllm"):
        raise UsageError(f"--for is vllm, not {serve!r}")
    if dense and serve:
        raise UsageError("--dense writes no adapter that could be served")
    if not base:
        raise Refused("none of these adapters names its base model", hint="name it with --base")
    if METHODS.get(method).kind == "factors":
        if rank not in ("auto", "sum") or energy is not None:
            raise UsageError(f"{method} keeps every rank", hint="use --method linear to reduce the rank")
        rank = "sum"
    if device.startswith("mps"):
        raise Refused("a merge computes in float64, which Apple's GPUs do not have", hint="use --device cpu")
    if METHODS.get(method).needs == "inputs" and inputs is None:
        raise UsageError(f"{method} needs examples to see what each module is fed", hint="give --data FILE.jsonl")
    if coefficients is not None and missing != "zero":
        raise UsageError(
            "learnt coefficients stand for every module by themselves: --missing has no meaning beside them"
        )
    if coefficients is not None and checked.get("per") == "adapter":
        raise UsageError("learnt coefficients differ between modules: --per adapter has no meaning beside them")
    if "inside" in checked and checked.get("per") == "adapter":
        raise UsageError(f"{method} merges each module in a space of its own: --per adapter has no meaning there")
    rank_choice(rank, energy, [1])
    if not all(math.isfinite(w) for w in [*weights, scaling]):
        raise UsageError("weights must be finite numbers")
    if not 0 < abs(scaling) <= _LARGEST_SCALING:
        raise UsageError(f"--lambda is a factor other than 0 and of {_LARGEST_SCALING:g} at most, not {scaling:g}")
    order = sorted(range(len(adapters)), key=lambda i: (adapters[i].ref.commit, adapters[i].ref.id))
    ordered = tuple(adapters[i] for i in order)
    for one, other in pairwise(ordered):
        if one.ref.commit == other.ref.commit and one.ref.id == other.ref.id:
            raise Refused(f"{one.ref.id} is given twice", hint="give it once, with the sum of the weights")
    modules = tuple(module for module in all_modules(ordered) if _in_scope(module, scope))
    if not modules:
        raise NothingMatched(f"none of the adapters' modules is in the scope {' '.join(scope)}")
    if outside := [adapter.ref.id for adapter in ordered if adapter.modules.keys().isdisjoint(modules)]:
        raise Refused(f"{', '.join(outside)}: no module in the scope {' '.join(scope)}", hint="leave it out")
    demand_same_shapes(ordered, modules)
    _check_rank(ordered, modules, rank)
    if serve:
        conv1d = [adapter.ref.id for adapter in ordered if adapter.fan_in_fan_out]
        demand_servable(conv1d=conv1d, rank=_asked_rank(ordered, modules, rank, energy))
    if missing == "renorm" and coefficients is None and cancel(weights):
        raise Refused("weights sum to zero, so --missing renorm has nothing to spread them by")
    return MergePlan(
        adapters=ordered,
        weights=tuple(float(weights[i]) for i in order),
        method=method,
        knobs=checked,
        base=base,
        modules=modules,
        scope=tuple(scope),
        rank=rank,
        energy=energy,
        scaling=scaling,
        norm_match=norm_match,
        missing=missing,
        dense=dense,
        serve=serve,
        dtype=dtype,
        device=device,
        coefficients=coefficients,
        inputs=inputs,
    )


def cancel(weights: Sequence[float]) -> bool:
    """True where weights sum to zero, or to what rounding leaves of that."""
    return abs(sum(weights)) <= 1e-12 * sum(map(abs, weights))


def rank_choice(rank: str, energy: float | None, ranks: Sequence[int]) -> RankChoice:
    """How the rank of a module's result is chosen where its adapters have `ranks`. UsageError for a wrong rank."""
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy lies in 0 < energy <= 1, not {energy}")
    if rank == "sum":
        return RankChoice(ceiling=sum(ranks), energy=energy, exact=energy is None)
    if rank == "auto":
        return RankChoice(ceiling=max(AUTO_RANK, *ranks) if energy is None else None, energy=energy)
    if not _is_number(rank) or int(rank) == 0:
        raise UsageError(f"--rank is a number above 0, sum or auto, not {rank!r}")
    return RankChoice(ceiling=int(rank), energy=energy)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _in_scope(module: str, scope: Sequence[str]) -> bool:
    return all(_holds(module, condition) for condition in scope)


def _holds(module: str, condition: str) -> bool:
    what, equals, listed = condition.partition("=")
    parts = [part.strip() for part in listed.split(",")]
    if not equals or what not in ("layers", "modules") or not all(parts):
        raise UsageError(f"--scope is layers=0-15,20 or modules=q_proj,*.mlp.*, not {condition!r}")
    if what == "modules":
        return any(fnmatch.fnmatchcase(name, part) for name in (module, module.rpartition(".")[2]) for part in parts)
    layer = next((int(part) for part in module.split(".") if part.isdecimal()), None)
    ranges = [_layers(part, condition) for part in parts]
    return layer is not None and any(low <= layer <= high for low, high in ranges)


def _layers(part: str, condition: str) -> tuple[int, int]:
    low, dash, high = part.partition("-")
    if not _is_number(low) or (dash and not _is_number(high)) or (dash and int(high) < int(low)):
        raise UsageError(f"--scope {condition}: {part!r} is no layer and no range of layers such as 0-15")
    return int(low), int(high) if dash else int(low)


def _check_rank(adapters: Sequence[OpenAdapter], modules: Sequence[str], rank: str) -> None:
    """Refuse a rank that no module can have: it would only pad every factor with zeros."""
    shapes = [adapter.modules[module] for adapter in adapters for module in modules if module in adapter.modules]
    most = max(min(factors.out_features, factors.in_features) for factors in shapes)
    if rank.isdecimal() and int(rank) > most:
        raise Refused(f"--rank {rank} is more than any of these modules can have, {most}", hint="use --rank auto")


def _asked_rank(adapters: Sequence[OpenAdapter], modules: Sequence[str], rank: str, energy: float | None) -> int:
    """The highest rank that the result is asked to have; 0 where that is left open."""
    if rank.isdecimal():
        return int(rank)
    if rank != "sum" or energy is not None:
        return 0
    return max(sum(a.modules[module].rank for a in adapters if module in a.modules) for module in modules)


def demand_same_shapes(adapters: Sequence[OpenAdapter], modules: Sequence[str]) -> None:
    """Refused where adapters disagree about the shape of a module."""
    for module in modules:
        shapes: dict[tuple[int, int], str] = {}
        for adapter in adapters:
            if factors := adapter.modules.get(module):
                shapes.setdefault((factors.out_features, factors.in_features), adapter.ref.id)
        if len(shapes) > 1:
            (one, first), (other, second) = list(shapes.items())[:2]
            raise Refused(
                f"{module} is {one[0]}×{one[1]} in {first} but {other[0]}×{other[1]} in {second}",
                hint="these adapters belong to different base models",
            )


def identical(adapters: Sequence[OpenAdapter], inputs: Mapping[str, str]) -> list[list[str]]:
    """The ids of adapters with the same bytes and scales, group by group.

    Args:
        inputs: `id@commit` → SHA-256 of the weights.
    """
    groups: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for adapter in adapters:
        content = inputs[adapter.ref.pinned], tuple(map(adapter.scale, adapter.modules))
        groups.setdefault(content, []).append(adapter.ref.id)
    return [ids for ids in groups.values() if len(ids) > 1]
