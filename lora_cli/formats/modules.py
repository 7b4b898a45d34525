"""From the names in an adapter's file to the matrices of its base model: one mapping for every command.

Modules that PEFT would apply go by the base's own names. Modules that PEFT would silently skip are repaired if
only one meaning is possible, with a note; all others are refused by name. Rules: PEFT 0.21
(`peft/utils/save_and_load.py`, `utils/transformers_weight_conversion.py`, `tuners/lora/layer.py:ParamWrapper`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from sys import intern

from lora_cli.formats.factors import PREFIX, AnyFactors, FusedFactors, ModuleFactors, Pair, shown, sort_tensors
from lora_cli.formats.facts import LoraConfigFacts
from lora_cli.formats.header import Header, TensorEntry
from lora_cli.formats.peft_omissions import left_out_by_peft
from lora_cli.formats.readings import INNER, rules
from lora_cli.formats.skeleton import OWN, WEIGHT, Kind, Matrix, Skeleton, Spelling, Stack
from lora_cli.names import leaf, parent
from lora_cli.text import counted, shortened

# Parts of names that training adds: torch.compile, gradient checkpointing, FSDP, DDP.
_WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"))
# Names, as in PEFT, of modules that share a weight in bases that tie them.
_TIED = ("embed_tokens", "lm_head")
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
"""The parameters of fused experts in the order in which transformers registers them."""


@dataclass(frozen=True)
class Located:
    """The contents of an adapter's file, by the base's own names.

    `notes` list repairs and omissions; `saved` are tensors of modules that were saved as they are, beside the
    update; `refusals` why the pairs of factors are not one update s·B·A per matrix of the base, or not the ones that
    its configuration describes. `spelling` is that of the class it was trained on, where this is another than the
    base's; `copies` are tensors of the base by its own names, saved beside the factors of their layer. `missing` are
    names for which the base has no matrix, `misfits` sentences about shapes.
    """

    modules: Mapping[str, AnyFactors]
    notes: tuple[str, ...] = ()
    saved: Mapping[str, TensorEntry] = field(default_factory=dict)
    refusals: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    misfits: tuple[str, ...] = ()
    spelling: Spelling = OWN
    copies: Mapping[str, TensorEntry] = field(default_factory=dict)

    @property
    def whole(self) -> tuple[str, ...]:
        """The modules of `saved`."""
        return tuple(dict.fromkeys(parent(name) for name in self.saved))

    @property
    def conflict(self) -> str:
        """The reason why the adapter does not fit the base, "" if it fits."""
        total = len(self.modules) + len(self.missing)
        if self.missing and not self.modules:
            return f"targets match no module of the base (such as {shortened(self.missing[0])})"
        if self.misfits:
            return self.misfits[0]
        if self.missing:
            missing = f"{len(self.missing):,} of {counted(total, 'module')}"
            return f"not in the base: {missing} (such as {shortened(self.missing[0])})"
        return ""

    @property
    def coverage(self) -> float:
        """The share of its matrices that the base has in the same shape."""
        total = len(self.modules) + len(self.missing)
        return (len(self.modules) - len(self.misfits)) / total if total else 0.0


@lru_cache(maxsize=64)
def locate_modules(config: LoraConfigFacts, header: Header, base: Skeleton | None = None) -> Located:
    """The factors of an adapter by the names of its base; without `base` by those in its file, wrappers taken off.

    Raises HeaderError where factors do not belong together.
    """
    found = sort_tensors(header)
    work = _Locating(config, base)
    work.place(found.pairs)
    notes, refusals = work.notes, [*found.refused, *work.refusals]
    notes += [f"modules that PEFT does not apply are left out: {why}" for why in work.ignored]
    if len(found.names) > 1:
        refusals.append(f"{len(found.names)} adapters in one file ({shortened(', '.join(sorted(found.names)))})")
    elif found.names:
        notes.append(f"names repaired: without the adapter's name {shortened(min(found.names))}")
    saved = {_unwrapped(entry.name)[0]: entry for entry in found.whole}
    if not (found.pairs or refusals):
        refusals.append("no LoRA tensors in its weights")
    elif not (work.modules or work.missing or refusals):
        refusals.append(f"PEFT applies none of its modules: {'; '.join(work.ignored)}")
    missing, misfits = tuple(work.missing), tuple(work.misfits)
    copies = {f"{work.names[place]}.{leaf(entry.name)}": entry for place, entry in found.copies if place in work.names}
    return Located(work.modules, tuple(notes), saved, tuple(refusals), missing, misfits, work.spelling, copies)


def fused(located: Located, base: Skeleton) -> Located:
    """The same with the parts of each expert's matrix as one, where a stack of `base` has that as its matrix."""
    modules: dict[str, AnyFactors] = {}
    parts: dict[str, dict[int, ModuleFactors]] = {}
    for name, factors in located.modules.items():
        matrix = base.get(name)
        if matrix is None or matrix.expert is None or not isinstance(factors, ModuleFactors):
            modules[name] = factors
        elif matrix.shape[0] == base.stacks[matrix.parameter].shape[0]:
            modules[_whole_name(matrix)] = replace(factors, module=_whole_name(matrix))
        else:
            parts.setdefault(_whole_name(matrix), {})[matrix.row] = factors
    for whole, by_row in parts.items():
        rows = tuple(sorted(by_row))
        height = _demanded(base, whole).shape[0]
        modules[whole] = FusedFactors(whole, tuple(by_row[row] for row in rows), rows, height)
    return replace(located, modules=modules)


def _demanded(base: Skeleton, name: str) -> Matrix:
    matrix = base.get(name)
    assert matrix is not None
    return matrix


class _Locating:
    """The work of naming one file's pairs."""

    def __init__(self, config: LoraConfigFacts, base: Skeleton | None) -> None:
        self._config = config
        self._base = base
        self.modules: dict[str, AnyFactors] = {}
        self.notes: list[str] = []
        self.ignored: list[str] = []
        self._refused: dict[str, list[str]] = {}
        self.missing: list[str] = []
        self.misfits: list[str] = []
        self.spelling = OWN
        self.names: dict[str, str] = {}

    @property
    def refusals(self) -> list[str]:
        """The first reason of each kind, with the number of others."""
        return [
            first + (f" (and {len(others):,} more like this)" if others else "")
            for first, *others in self._refused.values()
        ]

    def place(self, pairs: Mapping[str, Pair]) -> None:
        """Give every pair its name, or record why it has none."""
        # One text for a module's name in all adapters: a thousand of them would hold it a thousand times.
        plain = {place: intern(place.removeprefix(PREFIX)) for place in pairs if place.startswith(PREFIX)}
        bare = [place for place in pairs if place not in plain]
        names = self._direct(plain)
        odd = {place: pairs[place] for place in pairs if place not in names}
        if self._base is not None and self._base.peft_renames:
            names |= self._direct({place: place for place in bare})
            odd = {place: pair for place, pair in odd.items() if place not in names}
        ignored = [place for place in odd if not _unwrapped(place)[1]]
        self._note_ignored(ignored, f"without the prefix {PREFIX[:-1]}")
        names |= self._repaired([place for place in odd if place not in ignored], alone=not names)
        self._keep(pairs, names)
        self.names = names
        if self._base is not None:
            self._demand_whole_experts(self._base)
            self.notes += left_out_by_peft(self._base, self._config, self.modules)

    def _direct(self, plain: Mapping[str, str]) -> dict[str, str]:
        """The places whose names are the base's, or become so as PEFT renames them."""
        if self._base is None:
            return {place: name for place, name in plain.items() if _cleaned(place) == name}
        found = {place: name for place, name in plain.items() if self._known(name)}
        rest = {place: name for place, name in plain.items() if place not in found}
        if rest and self._base.peft_renames:
            renamed = self._base.renamed(rest.values(), ".lora_A.weight")
            # PEFT takes a renaming back that only cut something off the front.
            news = {place: new for place, name in rest.items() if not place.endswith(new := renamed.get(name, ""))}
            found |= {place: new for place, new in news.items() if self._known(new)}
        return found

    def _known(self, name: str) -> bool:
        assert self._base is not None
        return self._base.get(name) is not None or name.replace(INNER, "") in self._base.below

    def _repaired(self, places: Sequence[str], *, alone: bool) -> dict[str, str]:
        """Names for the other places by the first rule that names all of them; none if no rule does.

        `alone`: there are no others whose names need no rule.
        """
        if not places:
            return {}
        if self._base is None:
            names = {place: _cleaned(place) for place in places}
            self._note_repaired(names)
            return names
        bare = {place: _unwrapped(place)[0] for place in places}
        for rule, spelling in rules(self._base):
            names = dict(zip(bare, rule([*bare.values()]), strict=True))
            if all(map(self._known, names.values())):
                self.spelling = spelling if alone and self._trained_so(spelling) else OWN
                self._note_repaired(names)
                return names
        if inside := [name for name in bare.values() if self._base.in_attention(name)]:
            self._refuse("attention", f"{shortened(inside[0])} is in an nn.MultiheadAttention, which is not taken here")
        self.missing += bare.values()
        return {}

    def _trained_so(self, spelling: Spelling) -> bool:
        """Whether names of this spelling are those of another class, and no mistake.

        Names of a class with a head are. Names of the class without one are where the configuration says so.
        """
        assert self._base is not None
        architecture = self._base.architecture
        if spelling.added:
            return self._config.trained_class != architecture
        return self._config.for_another_class(architecture)

    def _note_repaired(self, names: Mapping[str, str]) -> None:
        place, name = next(iter(names.items()))
        what = "names repaired" if self.spelling == OWN else "names of another class"
        self.notes.append(f"{what}: {shortened(shown(place))} is {shortened(name)}")

    def _note_ignored(self, places: Sequence[str], why: str) -> None:
        if places:
            self.ignored.append(f"{len(places)} {why} (such as {shortened(shown(places[0]))})")

    def _keep(self, pairs: Mapping[str, Pair], names: Mapping[str, str]) -> None:
        """Keep the pairs that the configuration targets, by the base's name of their module or by the file's."""
        both = {place: {name, _unwrapped(place)[0]} for place, name in names.items()}
        every = set().union(*both.values())
        targeted, by_weight = self._config.targets.modules(every), self._config.targets.by_weight(every)
        patterns = [name + WEIGHT if both[place] & by_weight else name for place, name in names.items()]
        ranks = self._config.ranks_of(patterns)
        outside = []
        for (place, name), pattern, rank in zip(names.items(), patterns, ranks, strict=True):
            container = name.replace(INNER, "")
            if self._is_stack(container, name, pairs[place]):
                self._keep_stack(pairs[place], container, (len(name) - len(container)) // len(INNER))
            elif both[place] & (targeted | by_weight) or self._by_its_tie(name):
                self._keep_matrix(pairs[place], name, pattern, rank)
            else:
                outside.append(place)
        if self._config.targets.undecided:
            self.notes.append("target_modules is a regular expression that is not evaluated here: all modules count")
        self._note_ignored(outside, "outside target_modules")

    def _by_its_tie(self, name: str) -> bool:
        """Whether it is targeted through one that shares its weight: PEFT then gives the two one update."""
        if not self._config.ties_weights:
            return False
        if self._base is None:
            return leaf(name) in _TIED
        return bool(self._config.targets.modules(self._base.ties.get(name, ())))

    def _is_stack(self, container: str, name: str, pair: Pair) -> bool:
        if self._base is not None:
            return container in self._base.below
        return container.endswith(".experts") and not pair.convolution

    def _keep_stack(self, pair: Pair, container: str, depth: int) -> None:
        """Factors of fused experts: PEFT nests its layers, the parameter that is registered first innermost."""
        stacks = self._stacks_of(container)
        if depth >= len(stacks):
            self._refuse(
                "experts", f"factors of fused experts that its target_parameters do not name ({shortened(container)})"
            )
            return
        parameter, stack = stacks[len(stacks) - 1 - depth]
        rank = self._config.rank_of(parameter)
        experts = stack.experts if stack is not None else pair.rank // rank
        if pair.rank != rank * experts or not experts:
            self._refuse_rank(parameter, pair.rank, rank * max(experts, 1))
            return
        container, _, last = parameter.rpartition(".")
        for expert in range(experts):
            name = f"{container}.{expert}.{last}"
            factors = ModuleFactors(name, pair.a, pair.b, "parameter", parameter, expert, experts)
            self._add(factors, None if self._base is None else self._base.get(name))

    def _stacks_of(self, container: str) -> list[tuple[str, Stack | None]]:
        """The stacked parameters of a module that the configuration means, in the order of their registration."""
        targets = self._config.targets
        if self._base is not None:
            owned = self._base.below[container]
            return [(name, stack) for last, stack in owned.items() if targets.parameter(name := f"{container}.{last}")]
        names = [f"{container}.{last}" for last in EXPERT_PARAMETERS]
        return [(name, None) for name in names if targets.parameter(name)]

    def _keep_matrix(self, pair: Pair, name: str, pattern: str, rank: int) -> None:
        matrix = None if self._base is None else self._base.get(name)
        if matrix is not None and matrix.kind in ("embedding", "conv") and pattern != name:
            self._refuse(
                "parameter", f"{shortened(name)} is adapted as a parameter, which is taken of linear layers only"
            )
            return
        kind: Kind = "embedding" if pair.embedding else "conv" if pair.convolution else "linear"
        if matrix is not None and matrix.kind != kind and not (matrix.kind == "parameter" and kind == "linear"):
            self.misfits.append(f"{shortened(name)} takes factors of another kind than those there")
        factors = ModuleFactors(name, pair.a, pair.b, kind if matrix is None else matrix.kind, pattern)
        if rank != factors.rank:
            self._refuse_rank(name, factors.rank, rank)
        self._add(factors, matrix)

    def _refuse_rank(self, name: str, rank: int, wanted: int) -> None:
        self._refuse(
            "rank",
            f"{shortened(name)} has rank {rank} in its tensors and {wanted} in its configuration: PEFT cannot load it",
        )

    def _refuse(self, kind: str, reason: str) -> None:
        self._refused.setdefault(kind, []).append(reason)

    def _add(self, factors: ModuleFactors, matrix: Matrix | None) -> None:
        name, shape = factors.module, (factors.out_features, factors.in_features)
        if name in self.modules:
            self._refuse("twice", f"{shortened(name)} is there twice, under two names")
        self.modules[name] = factors
        if matrix is not None and shape != matrix.shape:
            self.misfits.append(f"shapes differ from base at {shortened(name)}: {shape} here, {matrix.shape} there")

    def _demand_whole_experts(self, base: Skeleton) -> None:
        """Of a stack either all experts are adapted or none: PEFT fuses them into one."""
        seen: dict[tuple[str, int], set[int]] = {}
        for matrix in base.experts(self.modules).values():
            assert matrix.expert is not None
            seen.setdefault((matrix.parameter, matrix.row), set()).add(matrix.expert)
        for (parameter, _), experts in seen.items():
            if left := sorted(set(range(base.stacks[parameter].experts)) - experts):
                self._refuse(
                    "expert", f"expert {left[0]} of {shortened(parameter)} has no factors: PEFT cannot load it"
                )


def _unwrapped(place: str) -> tuple[str, bool]:
    """A name without what PEFT and training wrappers put around it, and whether PEFT's prefix was there."""
    parts = place.split(".")
    prefixed = False
    while True:
        if parts[:2] == ["base_model", "model"]:
            parts, prefixed = parts[2:], True
        elif parts[0] in _WRAPPERS or (parts[0] == "module" and len(parts) > 1):
            parts = parts[1:]
        else:
            return ".".join(part for part in parts if part not in _WRAPPERS), prefixed


def _cleaned(place: str) -> str:
    """A name without wrappers, nor a layer of another adapter below it, where the base is not known."""
    name, _ = _unwrapped(place)
    return name if f".experts{INNER}" in name else name.replace(INNER, "")


def _whole_name(matrix: Matrix) -> str:
    container, _, last = matrix.parameter.rpartition(".")
    return f"{container}.{matrix.expert}.{last}"
