"""Copies of the base's weights that PEFT saves beside an update: whether they equal the base's weights.

PEFT loads such a copy over the base's weight, so a copy that differs changes the base although no update holds it.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.files import open_regular
from lora_cli.formats.checkpoint import Checkpoint, as_tensor, blocks, cached_model, folder_or_hub, open_checkpoint
from lora_cli.formats.header import TensorEntry
from lora_cli.formats.skeleton import Skeleton
from lora_cli.precision import FLOATS

THE_RIGHT_BASE = "use the adapter with the base model it was trained on"


def judge_copies(
    file: Path, copies: Mapping[str, TensorEntry], base: str, skeleton: Skeleton | None
) -> tuple[str, str]:
    """(fault, note on copies that could not be compared) of the copies in an adapter's file; "" for none.

    Args:
        copies: the copies by the names of the base's parameters.
        base: a folder or a Hub id; nothing is downloaded.
    """
    checkpoint = _here(base) if copies else None
    unknown = ""
    for parameter, copy in copies.items():
        tensor = None if checkpoint is None else _tensor_of(parameter, checkpoint, skeleton)
        if checkpoint is None or tensor is None or checkpoint.entry(tensor).dtype not in FLOATS:
            unknown = f"the copy of {parameter} is left out, not compared: {base} is not here, or lacks this weight"
        elif not _same(file, copy, checkpoint, tensor):
            return f"its copy of {parameter} differs from {base}, and PEFT would load it over the base's", ""
    return "", unknown


def _here(base: str) -> Checkpoint | None:
    """The base's files, None if they are not on this machine or cannot be read."""
    with contextlib.suppress(LoraError):
        found = folder_or_hub(base)
        folder = found if isinstance(found, Path) else cached_model(*found, tokenizer=False)
        return None if folder is None else open_checkpoint(folder, base)
    return None


def _tensor_of(parameter: str, checkpoint: Checkpoint, skeleton: Skeleton | None) -> str | None:
    """The tensor of a parameter, by its own name or by its tie; None if no tensor holds exactly this parameter."""
    if skeleton is None:
        return parameter if parameter in checkpoint.tensors else None
    module, _, last = parameter.rpartition(".")
    shares = skeleton.stored({name: checkpoint.entry(name).shape for name in checkpoint.tensors}).shares
    for one in (module, *skeleton.ties.get(module, ())):
        found = shares.get(f"{one}.{last}", [])
        if len(found) == 1 and not (found[0].rows or found[0].turned):
            return found[0].tensor
    return None


def _same(file: Path, copy: TensorEntry, checkpoint: Checkpoint, tensor: str) -> bool:
    """Whether a copy holds the numbers of the base's tensor, each rounded to its precision."""
    entry = checkpoint.entry(tensor)
    if entry.shape != copy.shape or copy.dtype not in FLOATS:
        return False
    shard = checkpoint.folder / checkpoint.tensors[tensor]
    pairs = zip(_read(file, copy), _read(shard, entry), strict=True)
    return all(_equal(one, other) for one, other in pairs)


def _read(file: Path, entry: TensorEntry) -> Iterator[Tensor]:
    with open_regular(file) as opened:
        for _, block in blocks(opened, entry, entry.shape[-1]):
            yield as_tensor(block, entry.dtype)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one tensor cast to either precision, or through half precision."""
    precisions: Sequence[torch.dtype] = (one.dtype, other.dtype, torch.bfloat16, torch.float16)
    return any(torch.equal(one.to(dtype), other.to(dtype)) for dtype in precisions)
