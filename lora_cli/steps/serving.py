"""A merged adapter as a server wants it: one rank in every module, of a size that the server allocates."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from lora_cli.adapters.base_names import split_revision
from lora_cli.adapters.checks import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.adapters.lowrank import LowRank
from lora_cli.adapters.reader import open_adapter
from lora_cli.adapters.store import AdapterFiles, folder_ref
from lora_cli.adapters.writer import AdapterWriter
from lora_cli.errors import Refused

# `max_lora_rank` of vLLM 0.14 takes these values (its configuration reference), and 1, which nobody serves.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Linear layers of decoder models of the Llama kind, apart and as vLLM fuses them. Which others it adapts hangs on its
# implementation of the model.
_VLLM_MODULES = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj")
)


def served_rank(rank: int) -> int:
    """The smallest `max_lora_rank` that vLLM accepts and that `rank` fits into. Refused above the largest."""
    for accepted in VLLM_RANKS:
        if rank <= accepted:
            return accepted
    raise Refused(f"vLLM serves ranks up to {VLLM_RANKS[-1]}, this result has {rank}", hint="give a lower --rank")


def demand_servable(*, transposed: bool, rank: int) -> None:
    """Refused for what vLLM has no LoRA layer for, and for a rank beyond those it serves."""
    if transposed:
        raise Refused("vLLM takes no LoRA on Conv1D modules (fan_in_fan_out)")
    served_rank(rank)


def not_surely_served(modules: Sequence[str]) -> list[str]:
    """The kinds of modules that vLLM may have no LoRA layer for."""
    return sorted({module.rpartition(".")[2] for module in modules} - _VLLM_MODULES)


def pad_for_vllm(folder: Path) -> int:
    """Rewrite the adapter in `folder` so that every module has the same, accepted rank; return that rank.

    vLLM reads r and lora_alpha but neither rank_pattern nor alpha_pattern. Ranks of zeros change no update.
    """
    files = AdapterFiles(folder_ref(folder), folder / CONFIG_NAME, folder / WEIGHTS_NAME)
    adapter = open_adapter(files)
    rank = served_rank(max(factors.rank for factors in adapter.modules.values()))
    padded = folder / "padded"
    padded.mkdir()
    [dtype] = adapter.dtypes
    with AdapterWriter(padded, list(adapter.modules), dtype) as writer:
        for module in adapter.modules:
            writer.add(module, _padded(adapter.read(module), rank))
        writer.finish(_kept(files.config))
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (padded / name).replace(folder / name)
    padded.rmdir()
    return rank


def serve_line(base: str, folder: Path, rank: int) -> str:
    """The shell line that serves the adapter on `base`, a Hub id or a folder; quoted, whatever their names hold.

    An id may carry its revision: `owner/name@revision`.
    """
    model, revision = split_revision(base)
    name, path = folder.name, str(folder.absolute())
    module = f"{name}={path}"
    if module.count("=") > 1 or "," in module or name.startswith(("-", "{")):
        # vLLM takes NAME=PATH apart at these signs; in JSON they are letters.
        module = json.dumps({"name": name, "path": path})
    at = ["--revision", revision] if revision else []
    lora = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", module]
    return shlex.join(["vllm", "serve", model, *at, *lora])


def _padded(update: LowRank, rank: int) -> LowRank:
    missing = rank - update.rank
    pad = torch.nn.functional.pad
    return LowRank(pad(update.B, (0, missing)), pad(update.A, (0, 0, 0, missing)))


def _kept(config: Path) -> dict[str, object]:
    """The configuration as it was but for the ranks, which are about to change."""
    facts = json.loads(config.read_text(encoding="utf-8"))
    return {
        key: value for key, value in facts.items() if key not in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    }
