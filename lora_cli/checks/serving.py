"""What programs that read PEFT folders make of one as it is: by their rules of November 2026, without running them.

Each program's scale of a module is set beside PEFT's: another one is applied without a word. docs/merging.md lists the
rules; tests/readers.py holds each anew as a function of a folder.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from lora_cli.formats.factors import AnyFactors
from lora_cli.formats.facts import DEFAULT_RANK, LoraConfigFacts
from lora_cli.formats.skeleton import Skeleton
from lora_cli.names import by_leaf, leaf
from lora_cli.text import counted, in_words

Verdict = Literal["right", "wrong", "refused"]
_SAME = 1e-6
_MAX_VLLM_RANK = 512
_NEEDS = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True, kw_only=True)
class Folder:
    """An adapter's folder: its configuration, its modules, PEFT's scale of each, and the base's modules if known.

    `beside` are modules with factors in the file that PEFT leaves out, as its configuration does not target them.
    """

    config: LoraConfigFacts
    modules: Mapping[str, AnyFactors]
    scales: Mapping[str, float]
    base: Skeleton | None = None
    beside: Mapping[str, AnyFactors] = field(default_factory=dict)

    @property
    def alpha(self) -> float:
        """lora_alpha, 0 where there is none."""
        return self.config.alpha or 0.0

    @property
    def rank(self) -> int:
        """r of the configuration."""
        return self.config.rank or DEFAULT_RANK

    @property
    def plain(self) -> float:
        """alpha / r, whatever else the configuration says."""
        return self.alpha / self.rank

    @property
    def rooted(self) -> float:
        """alpha / r, or alpha / √r for rslora."""
        return self.alpha / math.sqrt(self.rank) if self.config.rslora else self.plain

    def of_tensors(self, *, rslora: bool) -> dict[str, float]:
        """alpha over the rank of each module's own tensors, over its root where `rslora` counts and is set."""
        power = 0.5 if rslora and self.config.rslora else 1.0
        return {module: self.alpha / one.rank**power for module, one in self.modules.items()}

    def every(self, scale: float) -> dict[str, float]:
        """One scale for all modules."""
        return dict.fromkeys(self.modules, scale)

    def other_ranks(self) -> list[str]:
        """The modules whose rank is not r."""
        return [module for module, one in self.modules.items() if one.rank != self.rank]

    @property
    def all_modules(self) -> list[str]:
        """Every linear layer of the base as far as it is known, in its order."""
        return [*(self.modules if self.base is None else self.base.layers)]


class Reading(NamedTuple):
    """How a program reads a folder: its scale of each module that it applies, and the reasons why it does not load."""

    scales: Mapping[str, float]
    refuses: tuple[str, ...] = ()
    says: tuple[str, ...] = ()


Rule = Callable[[Folder], Reading]


class Program(NamedTuple):
    """A program with the version of its rules."""

    title: str
    rule: Rule


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The verdict, its reasons, and by module the program's scale over PEFT's where it is not 1 (0: ignored)."""

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    factors: Mapping[str, float] = field(default_factory=dict)


def judge(program: str, folder: Folder) -> Judged:
    """What the program called `program`, a key of `PROGRAMS`, makes of a folder."""
    reading = PROGRAMS[program].rule(folder)
    if reading.refuses:
        return Judged(verdict="refused", reasons=reading.refuses)
    factors = {}
    for module, scale in folder.scales.items():
        own = reading.scales.get(module, 0.0)
        if scale and abs(own - scale) > _SAME * abs(scale):
            factors[module] = own / scale
    reasons = [*_in_words(factors, len(folder.modules)), *reading.says]
    if idle := [module for module, scale in folder.scales.items() if not scale and reading.scales.get(module)]:
        reasons.append(f"applies {counted(len(idle), 'module')} whose scale is 0 in PEFT, such as {idle[0]}")
    if folder.beside and program not in AS_PEFT:
        many = counted(len(folder.beside), "module")
        reasons.append(f"applies {many} that PEFT leaves out (outside target_modules), such as {min(folder.beside)}")
    return Judged(verdict="wrong" if reasons else "right", reasons=tuple(reasons), factors=factors)


def judge_variant(program: str, reasons: Collection[str]) -> Judged | None:
    """The verdict on an adapter that is not s·B·A, for these reasons (`LoraConfigFacts.refusals`).

    None where the program's rule for them is not known.
    """
    names = {reason: reason.partition(":")[0] for reason in reasons}
    if refused := [reason for reason, name in names.items() if name in _REFUSED_VARIANTS.get(program, ())]:
        return Judged(verdict="refused", reasons=tuple(refused))
    return Judged(verdict="right") if {*names.values()} <= {*_READ_VARIANTS.get(program, ())} else None


def _in_words(factors: Mapping[str, float], total: int) -> Iterable[str]:
    ignored = [module for module, factor in factors.items() if factor == 0]
    if ignored:
        yield f"ignores {len(ignored)} of {counted(total, 'module')}, such as {ignored[0]}"
    others = {module: factor for module, factor in factors.items() if factor}
    if others:
        low, high = min(others.values()), max(others.values())
        by = f"{low:.3g}" if high - low < _SAME * high else f"{low:.3g} to {high:.3g}"
        first = next(iter(others))
        yield f"applies {len(others)} of {counted(total, 'module')} at {by} times their scale, such as {first}"


def _as_peft(folder: Folder) -> Reading:
    return Reading(folder.scales)


def _vllm(folder: Folder) -> Reading:
    highest = max([folder.rank, *folder.config.rank_pattern.values()])
    refuses = [f"rank {highest} is above {_MAX_VLLM_RANK}"] if highest > _MAX_VLLM_RANK else []
    if folder.config.fan_in_fan_out:
        refuses.append("no LoRA on Conv1D modules (fan_in_fan_out)")
    return Reading(folder.scales, tuple(refuses))


def _sglang(folder: Folder) -> Reading:
    refuses = _of_one_rank(folder)
    for module in folder.modules:
        last = leaf(module)
        if last in _NEEDS and module.removesuffix(last) + _NEEDS[last] not in folder.modules:
            refuses.append(f"{module} without {_NEEDS[last]}, with which it is fused")
            break
    if folder.config.fan_in_fan_out:
        refuses.append("no LoRA on Conv1D modules (fan_in_fan_out)")
    return Reading(folder.every(folder.plain), tuple(refuses))


def _llama_cpp(folder: Folder) -> Reading:
    refuses = []
    for module, one in folder.modules.items():
        tied = folder.base is not None and module in folder.base.ties
        if one.kind == "embedding" or tied:
            refuses.append(f"{module} is an embedding" if not tied else f"the weight of {module} is tied to another")
        elif one.kernel or len(one.parts) > 1 or one.parts[0].experts > 1 or ".experts." in module:
            refuses.append(f"{module} is no linear layer of its own")
    return Reading(folder.of_tensors(rslora=False), tuple(refuses[:1]))


def _lorax(folder: Folder) -> Reading:
    """Kind by kind: one that a layer lacks is dropped, and each kind's rank becomes the r of the next."""
    kinds: dict[str, list[str]] = {}
    for module in folder.all_modules:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", module, count=1), []).append(module)
    scales, rank = dict[str, float](), folder.rank
    for modules in kinds.values():
        if not all(module in folder.modules for module in modules):
            continue
        ranks = {folder.modules[module].rank for module in modules}
        if len(ranks) > 1:
            return Reading(
                {}, (f"ranks {in_words([*map(str, sorted(ranks))])} in modules of the kind of {modules[0]}",)
            )
        power = 0.5 if folder.config.rslora else 1.0
        scales |= dict.fromkeys(modules, folder.alpha / rank**power)
        rank = ranks.pop()
    return Reading(scales)


def _lmdeploy(folder: Folder) -> Reading:
    refuses = _of_one_rank(folder)
    targets = {*by_leaf(folder.modules)}
    missing = [one for one in folder.all_modules if leaf(one) in targets and one not in folder.modules]
    says = [f"adds uninitialised memory to {counted(len(missing), 'module')}, such as {missing[0]}"] if missing else []
    return Reading(folder.every(folder.plain), tuple(refuses), tuple(says))


def _of_one_rank(folder: Folder) -> list[str]:
    others = folder.other_ranks()
    if not others:
        return []
    return [f"r is {folder.rank}, and {others[0]} has rank {folder.modules[others[0]].rank}"]


PROGRAMS: Final[Mapping[str, Program]] = {
    "llama.cpp": Program("llama.cpp's converter of November 2026", _llama_cpp),
    "lmdeploy": Program("lmdeploy 0.18", _lmdeploy),
    "lorax": Program("LoRAX", _lorax),
    "olive": Program("Olive 0.13", lambda folder: Reading(folder.every(folder.rooted))),
    "openvino": Program("OpenVINO GenAI 2026.4", lambda folder: Reading(folder.every(1.0))),
    "peft": Program("PEFT 0.21", _as_peft),
    "sglang": Program("SGLang 0.5.23", _sglang),
    "tensorrt-llm": Program("TensorRT-LLM", lambda folder: Reading(folder.of_tensors(rslora=True))),
    "transformers": Program("transformers 5.24", _as_peft),
    "vllm": Program("vLLM 0.33.0", _vllm),
}
"""The programs by the names that users give them."""
AS_PEFT: Final = ("peft", "transformers")
"""Those that load by PEFT's own code: modules that are targets, and modules saved whole."""
# The variants of LoRA that a program applies as PEFT does, and those that it refuses by name.
_READ_VARIANTS: Final = {"peft": ("DoRA", "lora_bias", "aLoRA"), "transformers": ("lora_bias",)}
_REFUSED_VARIANTS: Final = {
    "vllm": (
        *("DoRA", "lora_bias", "aLoRA", "BD-LoRA", "QALoRA", "layer_replication"),
        *("PiSSA", "OLoRA", "CorDA", "LoftQ"),
    )
}
NAMES: Final = tuple(PROGRAMS)
