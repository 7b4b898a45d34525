"""A folder as a server would read it."""

from pathlib import Path

from lora_cli.checks.serving import Folder, Judged, judge
from lora_cli.errors import Refused
from lora_cli.formats.store import folder_ref
from lora_cli.steps.bases import skeleton_of
from lora_cli.steps.pool.gather import files_of, opened


def serve_check(folder: Path, program: str, base: str | None = None) -> tuple[Judged, str]:
    """The verdict on the adapter in `folder`, and a note where its base's modules are not known.

    Args:
        program: a name of `checks.serving`.
        base: the base model; None for the one that the adapter declares.

    Raises:
        NothingMatched: no such folder.
        Refused: no adapter in it, one in the form of another program, or one that is not s·B·A of linear layers; with
            the reason.
    """
    files = files_of(folder_ref(folder))
    if files.kind:
        raise Refused(
            f"{files.ref.id}: {files.kind}; the rules are for PEFT's own files",
            hint="lora convert makes a PEFT folder of it",
        )
    adapter = opened(files, None, whole=True)
    skeleton, unknown = skeleton_of(base or adapter.base) if base or adapter.base else (None, "it declares no base")
    if skeleton is not None:
        adapter = opened(files, skeleton, whole=True)
    found = Folder(config=adapter.config, modules=adapter.modules, scales=adapter.scales, base=skeleton)
    return judge(program, found), unknown
