"""A folder as a server would read it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lora_cli.checks.serving import AS_PEFT, PROGRAMS, Folder, Judged, judge, judge_variant
from lora_cli.errors import ConfigError, Refused
from lora_cli.exports import Source, export
from lora_cli.formats.base_files import CONFIG
from lora_cli.formats.config import parse_config
from lora_cli.formats.factors import AnyFactors
from lora_cli.formats.header import read_header
from lora_cli.formats.modules import locate_modules
from lora_cli.formats.reader import OpenAdapter
from lora_cli.formats.skeleton import Skeleton
from lora_cli.formats.store import AdapterFiles, folder_ref, read_config
from lora_cli.methods import file_names
from lora_cli.steps.bases import config_here, skeleton_of
from lora_cli.steps.export.request import config_of
from lora_cli.steps.pool.gather import files_of, opened


class Served(NamedTuple):
    """The verdict, a note where the base's modules are not known, and a remedy for another verdict than right."""

    judged: Judged
    unknown: str
    remedy: str


def serve_check(folder: Path, program: str, base: str | None = None) -> Served:
    """The verdict on the adapter in `folder`.

    Args:
        program: a name of `checks.serving`.
        base: the base model; None for the one that the adapter declares.

    Raises:
        NothingMatched: no such folder.
        Refused: no adapter in it, one in the form of another program, or one that is not s·B·A of linear layers alone
            where the program's rule for it is not known; with the reason.
    """
    files = files_of(folder_ref(folder))
    if files.kind:
        raise Refused(
            f"{files.ref.id}: {files.kind}; the rules are for PEFT's own files",
            hint="lora convert makes a PEFT folder of it",
        )
    if variants := _variants(files):
        if (judged := judge_variant(program, variants)) is None:
            raise Refused(f"{files.ref.id}: what {PROGRAMS[program].title} makes of it is not known: {variants[0]}")
        return Served(judged, "", "lora export takes no such adapter for any program")
    # PEFT and transformers load modules that were saved whole; what others make of them is not known.
    whole = program in AS_PEFT
    adapter = opened(files, None, whole=whole)
    named = base or adapter.base
    skeleton, unknown = skeleton_of(named) if named else (None, "it declares no base")
    if skeleton is not None:
        adapter = opened(files, skeleton, whole=whole)
    found = Folder(
        config=adapter.config,
        modules=adapter.modules,
        scales=adapter.scales,
        base=skeleton,
        beside=_beside(adapter, skeleton),
    )
    judged = judge(program, found)
    remedy = "" if judged.verdict == "right" else _remedy(program, adapter, named, skeleton)
    return Served(judged, unknown, remedy)


def _variants(files: AdapterFiles) -> tuple[str, ...]:
    """The reasons in its configuration why an adapter is not s·B·A; none where it cannot be read."""
    try:
        return parse_config(read_config(files.config.parent) or b"").refusals()
    except ConfigError:
        return ()


def _beside(adapter: OpenAdapter, skeleton: Skeleton | None) -> Mapping[str, AnyFactors]:
    """The modules with factors in the file that the configuration does not target: PEFT leaves them out."""
    if adapter.config.target_parameters:
        return {}
    every = replace(
        adapter.config, target_modules=(), layers_to_transform=False, exclude_modules=(), modules_to_save=()
    )
    located = locate_modules(every, read_header(adapter.files.weights), skeleton)
    return {name: one for name, one in located.modules.items() if name not in adapter.modules}


def _remedy(program: str, adapter: OpenAdapter, base: str, skeleton: Skeleton | None) -> str:
    """The export that the program reads rightly, or the reason why there is none."""
    target = {"llama.cpp": "gguf"}.get(program, program if program in file_names("lora_cli.exports") else "peft")
    place = config_here(base) if base else None
    config = {} if place is None else config_of(place / CONFIG)
    if target != "gguf" or config:
        try:
            export(target).plan(Source(adapter=adapter, base=base, config=config, skeleton=skeleton), "auto")
        except Refused as error:
            return f"lora export {target} refuses it too: {error.message}"
    return f"lora export {target} writes a form that it reads rightly"
