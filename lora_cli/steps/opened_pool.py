"""The opened pool: from the user's names to local, readable adapters of one base model."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.checks.examine import UNDECLARED
from lora_cli.errors import NothingMatched, Refused, UsageError
from lora_cli.formats.base_names import public_base
from lora_cli.formats.kinds import WEIGHTS_NAME
from lora_cli.formats.skeleton import Skeleton
from lora_cli.formats.store import folder_ref, locate
from lora_cli.hashes import hash_ahead
from lora_cli.imports import file_of
from lora_cli.licences import Policy, restrictions_of
from lora_cli.names import ids_and_commits, unpinned
from lora_cli.records import USABLE, Adapter, AdapterRef, AdapterRow, Progress, patient, silent, unheard
from lora_cli.settings import Settings, folder_of
from lora_cli.steps.bases import demand_one_base, skeleton_of
from lora_cli.steps.pool.fetch import bring
from lora_cli.steps.pool.gather import (
    Declared,
    base_of_rows,
    check_bases,
    declared_base,
    demand_common_names,
    demand_one_form_of_projections,
    files_of,
    needs_fusing,
    opened,
    sha256_of_weights,
)
from lora_cli.steps.pool.licences import Stated, stated_of, stated_of_base
from lora_cli.steps.pool.lookup import look_up, names_of, usable

if TYPE_CHECKING:
    from lora_cli.formats.delta import OpenDelta
    from lora_cli.formats.reader import OpenAdapter

MOST_WITHOUT_SELECTION = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Adapters ready to be read.

    `base` is the name under which results declare their base model; `inputs` maps each `id@commit` to the SHA-256 of
    its weights; `skeleton` holds the modules of the base's class, None if the class is not known; `unchecked` then
    gives the reason. If the result holds the adapters, `terms` maps each `id@commit`, and "" for the base, to the
    statements of its card, and `notice` names the licences that restrict.
    """

    adapters: "tuple[OpenAdapter, ...]"
    base: str
    inputs: Mapping[str, str]
    skeleton: Skeleton | None = None
    unchecked: str = ""
    terms: Mapping[str, Stated] = field(default_factory=dict)
    notice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One adapter or dense result, ready to be read; the others as in `Gathered`."""

    adapter: "OpenAdapter | OpenDelta"
    base: str
    inputs: Mapping[str, str]
    terms: Mapping[str, Stated]
    notice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Names of adapters, and their weights, None for an adapter without a weight of its own."""

    names: tuple[str, ...]
    weights: tuple[float | None, ...]

    @property
    def weighted(self) -> bool:
        """Whether any adapter has a weight of its own."""
        return any(weight is not None for weight in self.weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A catalogue with the user's base model.

    `base` is the base model that adapters must belong to. None means the base for which the catalogue lists them as
    usable, else their declared base. An adapter without a declared base belongs to `base` if its shapes fit.
    `aliases` are other names of `base`. `announce` gets a line for each adapter looked up on the Hub and, before
    weights are downloaded, a line with their size. `policy` is that of licences.
    """

    catalogue: Catalogue
    base: str | None = None
    aliases: Sequence[str] = ()
    announce: Callable[[str], None]
    progress: Progress = silent
    policy: Policy = "warn"

    @property
    def quiet(self) -> "Pool":
        """The same pool that announces nothing and reports no progress."""
        return replace(self, announce=unheard, progress=silent)

    def chosen(self, texts: Sequence[str], selection: str | None = None, recorded: Iterable[str] = ()) -> Chosen:
        """The adapters meant by texts ADAPTER[=WEIGHT]; without any, a selection or every usable adapter.

        Args:
            texts: the user's arguments, one adapter each.
            selection: the name of a selection, in place of texts.
            recorded: the adapters of a file that holds a weight for each; used if nothing else is named.

        Raises:
            NothingMatched: no such selection, no usable adapter, or too many of them.
            UsageError: texts beside a selection, a malformed weight, or weights beside such a file of weights.
        """
        known = tuple(recorded)
        if known and not texts and selection is None:
            return Chosen(names=known, weights=(None,) * len(known))
        if not texts:
            names = self._selected(selection)
            return Chosen(names=names, weights=(None,) * len(names))
        if selection is not None:
            raise UsageError("name adapters or a --selection, not both")
        weighted = [text for text in texts if "=" in text]
        ids = [id for text in weighted for one in (text, text.rpartition("=")[0]) for id, _ in ids_and_commits(one)]
        catalogued = self.catalogue.known(ids)
        pairs = [_split(text, catalogued) for text in texts]
        chosen = Chosen(names=tuple(name for name, _ in pairs), weights=tuple(weight for _, weight in pairs))
        if known and chosen.weighted:
            raise UsageError("=WEIGHT cannot be used with a file that holds the weights")
        return chosen

    def unweighted(self, texts: Sequence[str], selection: str | None = None, *, verb: str) -> tuple[str, ...]:
        """The names that `chosen` finds, for a verb that takes no weights. UsageError for a weight."""
        chosen = self.chosen(texts, selection)
        if any(weight is not None for weight in chosen.weights):
            raise UsageError(f"{verb} takes adapters without =WEIGHT")
        return chosen.names

    def _selected(self, name: str | None) -> tuple[str, ...]:
        """The last selection (or the last called `name`), else every usable adapter of the base if they are few."""
        selection = self.catalogue.selections.last(name)
        if selection is not None:
            called = f" {selection.name!r}" if selection.name else ""
            label = f"selection {name!r}" if name else f"last selection{called}"
            self.announce(f"adapters: the {label}, {len(selection.refs)} by {selection.method}")
            known = self.catalogue.known([ref.id for ref in selection.refs])
            held = {ref.id for ref in selection.refs if ref.id in known and known[ref.id].status == "quarantined"}
            if held:
                self.announce(f"left out, quarantined since: {', '.join(sorted(held))}")
            return tuple(ref.pinned for ref in selection.refs if ref.id not in held)
        if name is not None:
            raise NothingMatched(
                f"no selection called {name!r}", hint="make one: lora select --by random -k 8 --name NAME"
            )
        pinned, _, bases = self.catalogue.candidates(base=self.base)
        demand_one_base(bases)
        if not pinned:
            raise NothingMatched("no adapters selected, and none usable in the catalogue", hint="run lora pool sync")
        if len(pinned) > MOST_WITHOUT_SELECTION:
            raise NothingMatched(
                f"no adapters selected, and {len(pinned):,} are usable",
                hint="choose some: lora select --by random -k 30",
            )
        all_of_them = "the only usable one" if len(pinned) == 1 else f"all {len(pinned):,} usable ones"
        self.announce(f"adapters: {all_of_them} in the catalogue")
        return tuple(pinned)

    def adapters(
        self,
        names: Sequence[str],
        *,
        whole: bool = False,
        passed_on: bool = False,
        sure: "Callable[[OpenAdapter, str], bool] | None" = None,
    ) -> Gathered:
        """Find, fetch where needed, open and check adapters.

        Args:
            names: catalogue ids, `id@commit` (or the start of one), local folders, or ids that only the Hub knows.
            whole: also accept adapters that hold modules saved whole, for their updates.
            passed_on: the result holds the adapters, so that the policy on licences counts.
            sure: whether an adapter's modules are those of the base of this name, without building the base's class.

        Raises:
            NothingMatched: an id that is neither in the catalogue nor on the Hub.
            AccessDenied: a gated adapter.
            NetworkError: an id or weights have to come from the Hub, which cannot be reached.
            Refused: an adapter that cannot be used, weights that changed since they were catalogued, or two bases; or
                licences that the policy forbids.
        """
        if not names:
            raise NothingMatched("no adapters selected", hint="name some, or run lora select")
        report = patient(self.progress)
        if len(names) > 1:
            hash_ahead([folder / WEIGHTS_NAME for name in names if (folder := folder_of(name)) is not None], report)
        found = []
        for done, name in enumerate(names, 1):
            found.append(self._find(name, whole=whole))
            report("looking up adapters", done, len(names))
        self.announce_held(rows := [row for _, row in found if row is not None])
        base = self.base or base_of_rows(rows)
        terms = stated_of(found) if passed_on else {}
        if passed_on:
            # Before weights are downloaded.
            restrictions_of(self.policy, {unpinned(pinned): one.licence for pinned, one in terms.items()})
        bring(self.catalogue, [row.ref for row in rows], self.announce, self.progress, whole=whole)
        here = [files_of(ref) for ref, _ in found]
        if len(here) > 1:
            hash_ahead([files.weights for files in here], report)
        known = names_of(self.catalogue, base, self.aliases)
        judged = [declared_base(files, row, self.base) for files, (_, row) in zip(here, found, strict=True)]
        # Sort, so that the order of the arguments does not matter.
        declared = sorted(judged, key=lambda one: one.ref.pinned)
        check_bases(declared, base, known)
        name = base or declared[0].base
        certain = sure is not None and all(sure(opened(files, None, whole=whole), name) for files in here)
        skeleton, unchecked = (None, "") if certain else skeleton_of(name)
        adapters, inputs = [], {}
        for files, (ref, row) in zip(here, found, strict=True):
            # Open before hashing, so that a later change of the file is detected on read.
            adapters.append(opened(files, skeleton, whole=whole))
            inputs[ref.pinned] = sha256_of_weights(files, row)
            report("opening adapters", len(adapters), len(here))
        if skeleton is None:
            named = [(adapter.ref.id, adapter.modules) for adapter in adapters]
            demand_common_names(named)
            demand_one_form_of_projections(named)
        elif needs_fusing(adapters, skeleton):
            adapters = [opened(files, skeleton, whole=whole, fuse=True) for files in here]
        self._announce_notes(adapters, judged, base, skeleton)
        public = public_base(base or "", known, [one.base for one in declared])
        if passed_on:
            terms[""] = self.base_terms(base or declared[0].base)
        return Gathered(
            adapters=tuple(adapters),
            base=public,
            inputs=inputs,
            skeleton=skeleton,
            unchecked=unchecked,
            terms=terms,
            notice=self.notice(terms, public) if passed_on else "",
        )

    def _announce_notes(
        self, adapters: "Sequence[OpenAdapter]", judged: Sequence[Declared], base: str | None, skeleton: Skeleton | None
    ) -> None:
        """A line for each note on an adapter. Refused where a copy of a weight of the base is another one."""
        for adapter, one in zip(adapters, judged, strict=True):
            taken = "" if adapter.base or skeleton is not None else f"{UNDECLARED}: taken to be for {one.base}"
            converted = f"{adapter.files.kind}, converted" if adapter.files.kind else ""
            unknown = _demand_same_copies(adapter, base or one.base, skeleton) if adapter.copies else ""
            for note in filter(None, [converted, taken, *adapter.notes, unknown]):
                self.announce(f"{adapter.ref.id}: {note}")

    def announce_held(self, rows: Sequence[AdapterRow]) -> None:
        """A line for each of the adapters that is in quarantine, and used all the same."""
        for row in rows:
            if row.status == "quarantined":
                self.announce(f"{row.id} is quarantined: {row.reason}")

    def base_terms(self, base: str) -> Stated:
        """What the card of a base states, as far as it is here; by one request where the policy refuses."""
        return stated_of_base(base, ask=self.policy in ("commercial", "share-alike"))

    def notice(self, terms: Mapping[str, Stated], base: str) -> str:
        """A line that names the licences that restrict, "" for none. Refused where the policy forbids them."""
        adapters = {unpinned(pinned): one.licence for pinned, one in terms.items() if pinned}
        return restrictions_of(self.policy, adapters, (base, terms[""].licence))

    def update(self, name: str) -> "Update":
        """One adapter, or the dense result of a merge in a folder.

        Raises:
            DataError: the record of a dense result is missing or malformed. Else as `adapters` does.
        """
        from lora_cli.formats.delta import dense_folder, open_delta

        folder = dense_folder(name)
        if folder is None:
            found = self.adapters([name], passed_on=True)
            return Update(
                adapter=found.adapters[0],
                base=found.base,
                inputs=found.inputs,
                terms=found.terms,
                notice=found.notice,
            )
        delta = open_delta(folder, self.progress)
        known = names_of(self.catalogue, self.base, self.aliases)
        check_bases([Declared(delta.ref, delta.base)], self.base, known)
        base = public_base(self.base or "", known, [delta.base])
        terms = {**stated_of([(delta.ref, None)]), "": self.base_terms(self.base or delta.base)}
        return Update(
            adapter=delta,
            base=base,
            inputs={delta.ref.pinned: delta.sha256},
            terms=terms,
            notice=self.notice(terms, base),
        )

    def absent(self, names: Sequence[str]) -> list[Adapter]:
        """The adapters of `names` whose weights `adapters` would download. Stores nothing; raises like `adapters`."""
        return [row for ref, row in self.found(names) if row is not None and locate(ref) is None]

    def found(self, names: Sequence[str]) -> list[tuple[AdapterRef, Adapter | None]]:
        """Each adapter with its row, None for a folder that is not catalogued. Stores and downloads nothing."""
        return [self._find(name, store=False) for name in names]

    def _find(self, name: str, *, whole: bool = False, store: bool = True) -> tuple[AdapterRef, Adapter | None]:
        """An adapter and its row; no row for a folder that the catalogue lacks at this commit or lists as unusable."""
        folder = folder_of(name) or file_of(name)
        if folder is None:
            look = partial(look_up, self.catalogue, base=self.base or "", aliases=self.aliases, announce=self.announce)
            row = usable(look(name, whole=whole, store=store, progress=self.progress), whole=whole)
            return row.ref, row
        ref, here = folder_ref(folder), self.catalogue.at(folder)
        # The stored verdict was for the base of the last sync; this base may differ, so judge the files again.
        if here is None or here.commit != ref.commit:
            return ref, None
        return here.ref, here if here.status in USABLE else None


def pool_of(settings: Settings, announce: Callable[[str], None], progress: Progress = silent) -> Pool:
    """The pool of the settings: catalogue, base model and its other names. Its catalogue is the caller's to close."""
    return Pool(
        catalogue=Catalogue(settings.db),
        base=settings.base,
        aliases=settings.base_aliases,
        announce=announce,
        progress=progress,
        policy=settings.license_policy,
    )


@contextmanager
def open_pool(settings: Settings, announce: Callable[[str], None], progress: Progress = silent) -> Iterator[Pool]:
    """`pool_of`, closed at the end of the block."""
    pool = pool_of(settings, announce, progress)
    with pool.catalogue:
        yield pool


def _demand_same_copies(adapter: "OpenAdapter", base: str, skeleton: Skeleton | None) -> str:
    """A note on copies that could not be compared, "" for none. Refused where a copy of a weight is another one."""
    from lora_cli.steps.pool.copies import THE_RIGHT_BASE, judge_copies

    wrong, unknown = judge_copies(adapter.files.weights, adapter.copies, base, skeleton)
    if wrong:
        raise Refused(f"{adapter.ref.id}: {wrong}", hint=THE_RIGHT_BASE)
    return unknown


def _split(text: str, catalogued: Collection[str]) -> tuple[str, float | None]:
    """ADAPTER[=WEIGHT] as a name and its weight. A name may hold "=" itself, as some of the ids `catalogued` do."""
    name, equals, weight = text.rpartition("=")
    whole, part = (any(id in catalogued for id, _ in ids_and_commits(one)) for one in (text, name))
    if not equals or folder_of(text) is not None:
        return text, None
    try:
        if not weight.isascii() or "_" in weight:
            raise ValueError("a spelling of Python's own")
        number = float(weight)
    except ValueError:
        if whole:
            return text, None
        raise UsageError(f"{text}: the weight after = is not a number") from None
    if whole and part:
        raise UsageError(f"{text} is the name of one adapter and a weight of another", hint=f"the first is {text}=1")
    return (text, None) if whole else (name, number)
