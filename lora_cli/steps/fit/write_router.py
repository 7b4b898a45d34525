"""A router as one folder: router.json, each adapter in a folder of its own beside it, and the losses on examples."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.routing import Routing, along_the_strongest
from lora_cli.errors import OutputError, Refused
from lora_cli.formats.base_names import split_revision
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.reader import OpenAdapter, open_adapter
from lora_cli.formats.router import NO_LORA, ROUTER_FILE, Member, RouterFile
from lora_cli.formats.run_record import Run
from lora_cli.formats.skeleton import Skeleton
from lora_cli.formats.store import AdapterFiles, folder_ref
from lora_cli.formats.writer import AdapterWriter
from lora_cli.hashes import sha256_of
from lora_cli.merge_options import MergeOptions
from lora_cli.models.ref import BaseRef
from lora_cli.models.router import Router
from lora_cli.names import leaf, leaves
from lora_cli.outputs import whole_folder
from lora_cli.records import Progress, silent
from lora_cli.scores import paired_difference
from lora_cli.steps.fit.controls import Comparison
from lora_cli.steps.fit.fit import NOISES
from lora_cli.steps.merge.card import code, licence_of_all, stated
from lora_cli.steps.merge.stream import MergePlan, config_of, dtype_of, plan
from lora_cli.steps.pool.licences import Stated, recorded_licences
from lora_cli.steps.train.descent import Parts, losses
from lora_cli.task import Task
from lora_cli.text import counted

_LONGEST_NAME = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePlan:
    """A router that passed every check which needs no weights.

    `preset` with `knobs` gives `routing`. `merging` holds the adapters in canonical order and their base.
    """

    preset: str
    knobs: Mapping[str, Any]
    routing: Routing
    skeleton: Skeleton
    merging: MergePlan

    @property
    def adapters(self) -> Sequence[OpenAdapter]:
        """The adapters, in canonical order."""
        return self.merging.adapters

    @property
    def why_not(self) -> str:
        """Why PEFT's Arrow cannot run this router, "" if it can.

        PEFT gives each adapter a place in every linear layer that has one of the targets' last names.
        """
        if self.routing.score is not along_the_strongest:
            return "PEFT has no such router"
        modules = {*self.merging.modules}
        if lacking := [adapter.ref.id for adapter in self.adapters if adapter.modules.keys() != modules]:
            return f"PEFT needs the same modules in all adapters, and {lacking[0]} lacks some"
        matrices = self.skeleton.matrices
        named = leaves(modules)
        for module in sorted({name for name in matrices if leaf(name) in named} | modules):
            if module not in modules:
                return f"PEFT routes all modules called {leaf(module)}, and no adapter has {module}"
            if module not in self.skeleton.layers or self.merging.layout.of[module].by_parameter:
                return f"PEFT routes only linear layers, and it does not take {module} for one"
        return ""

    def of_one(self, adapter: OpenAdapter) -> MergePlan:
        """The plan of writing one of the adapters as it is."""
        return plan(
            [adapter], [1.0], MergeOptions(method="cat"), base=self.merging.base, skeleton=self.merging.skeleton
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """What a router is measured on: the held-out part of a task, as a fit by the same seed would split it."""

    ref: BaseRef
    task: Task
    controls: Sequence[str]
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """Its part of a run's settings. Nothing is learnt from the task, so it is not called `data`."""
        name = self.task.file.name
        return {**self.ref.settings, "measured_on": name, "seed": self.seed, "controls": list(self.controls)}

    @property
    def inputs(self) -> dict[str, str]:
        """Its part of a run's inputs."""
        return {**self.ref.inputs, **self.task.inputs}

    def of(self, router: Router, progress: Progress) -> "Measured":
        """The loss of the router beside the base, and beside routers over noise."""
        base = self.ref.load(progress)
        validation = Parts.of(base.encode_all, self.task.examples, held=self.task.held, seed=self.seed).validation
        with router.applied(base, progress=progress):
            loss, ours = losses(base, validation)
        others = {"base": losses(base, validation)}
        for control in self.controls:
            with router.applied(base, noise=NOISES[control], seed=self.seed, progress=progress):
                others[control] = losses(base, validation)
        comparisons = tuple(
            Comparison(against=name, loss=other, difference=paired_difference(ours, each, seed=self.seed))
            for name, (other, each) in others.items()
        )
        return Measured(loss=loss, n_validation=len(validation), comparisons=comparisons)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The mean loss per token of a router on `n_validation` examples, and that of others beside it."""

    loss: float
    n_validation: int
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteReport:
    """The result of `write_router`; `measured` is None without examples."""

    router: RouterFile
    modules: int
    measured: Measured | None


def write_router(
    plan: RoutePlan,
    folder: Path,
    run: Run,
    measuring: Measuring | None = None,
    *,
    replace: bool = False,
    progress: Progress = silent,
) -> RouteReport:
    """Write every adapter as PEFT loads it, and router.json beside them; then measure what was written.

    The folder is whole or absent. Where PEFT can run the router, all adapters get one rank, filled up with zeros.

    Raises:
        Refused: an adapter changes nothing, or holds NaN or Inf.
        OutputError: `folder` exists (and `replace` is false), cannot be written, or holds one of the adapters.
    """
    if any(adapter.folder.resolve().is_relative_to(folder.resolve()) for adapter in plan.adapters):
        raise OutputError(f"{folder} holds one of the adapters", hint="choose another folder with -o")
    why_not = plan.why_not
    rank = 0 if why_not else max(one.rank for adapter in plan.adapters for one in adapter.modules.values())
    with whole_folder(folder, replace=replace) as partial:
        members = _write_adapters(plan, partial, run, rank, progress)
        router = RouterFile(
            preset=plan.preset,
            knobs=plan.knobs,
            base=plan.merging.base,
            adapters=members,
            peft=None if why_not else _of_peft(plan.routing, len(members)),
            why_not=why_not,
        )
        (partial / ROUTER_FILE).write_text(router.text, encoding="utf-8")
        run.outputs[ROUTER_FILE] = sha256_of(partial / ROUTER_FILE)
        run.results["licences"] = recorded_licences(plan.merging.terms)
        measured = None
        if measuring is not None:
            written = [_opened(partial / one.folder, plan.skeleton) for one in members]
            measured = measuring.of(Router(written, plan.routing), progress)
            run.results |= asdict(measured)
        run.write(partial)
        (partial / "README.md").write_text(_card(plan, router), encoding="utf-8")
    return RouteReport(router=router, modules=len(plan.merging.modules), measured=measured)


def _write_adapters(plan: RoutePlan, folder: Path, run: Run, rank: int, progress: Progress) -> tuple[Member, ...]:
    """Write each adapter into a folder of its own, named by its place and its name."""
    members, width = [], len(str(len(plan.adapters) - 1))
    for place, adapter in enumerate(plan.adapters):
        progress("writing adapters", place, len(plan.adapters))
        name = re.sub(r"[^A-Za-z0-9._-]", "-", adapter.ref.id.rpartition("/")[2])[:_LONGEST_NAME]
        own = folder / f"{place:0{width}}-{name}"
        own.mkdir()
        _write_adapter(plan.of_one(adapter), own, rank)
        run.outputs |= {f"{own.name}/{file}": sha256_of(own / file) for file in (CONFIG_NAME, WEIGHTS_NAME)}
        sha256 = run.outputs[f"{own.name}/{WEIGHTS_NAME}"]
        members.append(Member(folder=own.name, adapter=adapter.ref.pinned, sha256=sha256))
    return tuple(members)


def _write_adapter(own: MergePlan, folder: Path, rank: int) -> None:
    """Write one adapter in PEFT's format, its modules filled up with zeros to `rank`, or to its own highest."""
    [adapter] = own.adapters
    with AdapterWriter(folder, own.layout, dtype_of(own)) as writer:
        for module in own.modules:
            update = adapter.read(module)
            writer.add(module, _filled_up(update, rank) if rank > update.rank else update)
        if writer.empty:
            raise Refused(
                f"{adapter.ref.id}: no effect, because lora_B or lora_alpha is zero", hint="leave this adapter out"
            )
        writer.finish(config_of(own))


def _filled_up(update: LowRank, rank: int) -> LowRank:
    more = rank - update.rank
    return LowRank(
        torch.cat([update.B, update.B.new_zeros(update.B.shape[0], more)], dim=1),
        torch.cat([update.A, update.A.new_zeros(more, update.A.shape[1])]),
    )


def _opened(folder: Path, skeleton: Skeleton) -> OpenAdapter:
    return open_adapter(AdapterFiles(folder_ref(folder), folder / CONFIG_NAME, folder / WEIGHTS_NAME), skeleton)


def _of_peft(routing: Routing, adapters: int) -> dict[str, Any]:
    """The arguments of PEFT's ArrowConfig, which has no 0 for all, and fails for a top_k above their number."""
    return {"router_temperature": routing.temperature, "top_k": min(routing.top_k or adapters, adapters)}


def _card(plan: RoutePlan, router: RouterFile) -> str:
    """The model card: front matter that the Hub reads, and every adapter at its commit."""
    name, revision = split_revision(router.base)
    base = code(name) + (f" at revision {code(revision)}" if revision else "")
    terms = plan.merging.terms
    parents = [terms.get(adapter.ref.pinned, Stated()) for adapter in plan.adapters]
    front: dict[str, Any] = {"base_model": name, "tags": ["lora", "router"], **licence_of_all(parents)}
    knobs = ", ".join(f"{knob} {value}" for knob, value in router.knobs.items())
    peft = "PEFT's `create_arrow_model` runs it too." if router.peft else f"{router.why_not}."
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        "# Router of LoRAs",
        "",
        f"{counted(len(router.adapters), 'adapter')} of {base} under `{router.preset}` ({knobs}), {NO_LORA}.",
        f"`lora eval` applies it. {peft}",
        "",
        "| folder | adapter | commit | licence |",
        "|---|---|---|---|",
    ]
    for member, adapter, one in zip(router.adapters, plan.adapters, parents, strict=True):
        ref = adapter.ref
        lines.append(f"| `{member.folder}` | {code(ref.id)} | `{ref.commit}` | {stated(one.licence)} |")
    if "" in terms:
        lines += ["", f"Licence of the base: {stated(terms[''].licence)}."]
    return "\n".join([*lines, ""])
