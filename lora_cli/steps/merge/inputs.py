"""Samples of each module's activations while each adapter is applied, for RegMean."""

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_cli.algebra.draws import uniform
from lora_cli.errors import OutputError, Refused, UsageError
from lora_cli.formats.reader import OpenAdapter
from lora_cli.models.activations import activations
from lora_cli.models.base_model import BaseModel
from lora_cli.models.encode import Encoded, until_end
from lora_cli.models.ref import BaseRef
from lora_cli.precision import dtype_name, remedy
from lora_cli.records import Progress, silent
from lora_cli.steps.evaluate.evaluate import Updates
from lora_cli.task import load_task, task_sha256


def data_of(given: Sequence[str], adapters: Sequence[OpenAdapter]) -> dict[str, Path]:
    """The task file of each adapter (`id@commit`), from one FILE for all or from ADAPTER=FILE for each.

    Raises:
        UsageError: both at once, an adapter left without a file, or a name that matches no adapter.
    """
    whole = [one for one in given if "=" not in one or os.path.isfile(one)]  # noqa: PTH113 - never raises
    if len(whole) > 1 or (whole and len(given) > 1):
        raise UsageError(f"--data is one FILE for all adapters or ADAPTER=FILE for each, not {' and '.join(given)}")
    if whole:
        return {adapter.ref.pinned: Path(whole[0]) for adapter in adapters}
    files = {name: Path(file) for name, _, file in (one.partition("=") for one in given)}
    names = {adapter.ref.id for adapter in adapters}
    if other := sorted(files.keys() - names):
        raise UsageError(f"--data {other[0]}=…: no adapter of this merge", hint=f"there are {', '.join(sorted(names))}")
    if bare := sorted(names - files.keys()):
        raise UsageError(
            f"no --data for {', '.join(bare)}", hint="give ADAPTER=FILE.jsonl for each, or one FILE for all"
        )
    return {adapter.ref.pinned: files[adapter.ref.id] for adapter in adapters}


@dataclass(frozen=True, slots=True)
class _Sample:
    """The place of one module's sample in the spool."""

    offset: int
    shape: tuple[int, int]


@dataclass(slots=True, kw_only=True)
class ModuleInputs:
    """Samples of activations, on the disk; called as samples(adapter, module) once they are collected.

    Before `collect` only the task files are read; their bytes go into `inputs`. A sample is drawn from all tokens of
    the rendered prompts and completions of a file, without the end token and the tokens after it. Every module, and
    every adapter with that file, gets the same tokens.

    Args:
        base: each adapter is applied to it in turn; the samples have its precision.
        files: per adapter (`id@commit`) its task file; see `data_of`.
        tokens: the most tokens per adapter.
        seed: decides which tokens are drawn.
    """

    base: BaseRef
    files: Mapping[str, Path]
    tokens: int = 256
    seed: int = 0
    _hashes: dict[Path, str] = field(init=False)
    _samples: dict[tuple[str, str], _Sample] = field(init=False, default_factory=dict)
    _spool: Path = field(init=False, default=Path())
    _dtype: torch.dtype = field(init=False, default=torch.float32)

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"a sample has at least 1 token, not {self.tokens}")
        self._hashes = {file: task_sha256(file) for file in self.files.values()}

    @property
    def settings(self) -> dict[str, Any]:
        """The samples' part of a run's settings."""
        data = {pinned: self._hashes[file] for pinned, file in self.files.items()}
        return {"module_inputs": {**self.base.settings, "tokens": self.tokens, "seed": self.seed, "data": data}}

    @property
    def inputs(self) -> dict[str, str]:
        """The samples' part of a run's inputs."""
        return self.base.inputs | {f"data:{file.name}@{sha[:12]}": sha for file, sha in self._hashes.items()}

    def collect(
        self,
        adapters: Sequence[OpenAdapter],
        modules: Collection[str],
        folder: Path,
        *,
        progress: Progress = silent,
    ) -> None:
        """Load the base, run each adapter's examples with that adapter applied, and keep the samples.

        Modules with the same input (q_proj, k_proj, v_proj) share their bytes: for an 8B model with 32 layers, an
        adapter's 256 tokens in bf16 take about 0.45 GB on the disk and, during its run, 0.65 GB of memory.

        Args:
            modules: the modules to sample; the whole adapter is applied all the same.
            folder: an empty folder, which must exist as long as the samples are read.

        Raises:
            DataError: a task file cannot be used. OutputError: the folder cannot be written.
            Refused: an adapter does not fit the base, or one of its modules does not see every token.
        """
        base = self.base.load(progress)
        self._dtype, self._spool = base.dtype, folder / "inputs"
        read = {file: self._drawn(base, file) for file in self._hashes}
        for done, adapter in enumerate(adapters):
            progress("inputs", done, len(adapters))
            examples, places = read[self.files[adapter.ref.pinned]]
            with base.applied(Updates(adapter), who=adapter.ref.id):
                wanted = [module for module in adapter.modules if module in modules]
                sampled = activations(base, wanted, examples, places)
            try:
                self._keep(adapter, sampled)
            except OSError as error:
                raise OutputError(f"{folder}: cannot be written ({error.strerror})") from error
        progress("inputs", len(adapters), len(adapters))

    def __call__(self, adapter: OpenAdapter, module: str) -> Tensor:
        """(tokens, in) in the base's precision."""
        sample = self._samples[adapter.ref.pinned, module]
        count = sample.shape[0] * sample.shape[1] * self._dtype.itemsize
        with self._spool.open("rb", buffering=0) as file:
            file.seek(sample.offset)
            return torch.frombuffer(bytearray(file.read(count)), dtype=self._dtype).view(sample.shape)

    def _drawn(self, base: BaseModel, file: Path) -> tuple[list[Encoded], list[list[int]]]:
        """The examples of a file that hold a drawn token, and their drawn tokens."""
        encoded = base.encode_all(load_task(file))
        lengths = torch.tensor([_end_of(item) for item in encoded])
        numbers = uniform(self.seed, int(self._hashes[file][:16], 16), 0, int(lengths.sum()))
        drawn = numbers.argsort(stable=True)[: self.tokens].sort().values
        ends = lengths.cumsum(0)
        owners = torch.searchsorted(ends, drawn, right=True)
        places: dict[int, list[int]] = {}
        for owner, token in zip(owners.tolist(), (drawn - (ends - lengths)[owners]).tolist(), strict=True):
            places.setdefault(owner, []).append(token)
        return [encoded[owner] for owner in places], list(places.values())

    def _keep(self, adapter: OpenAdapter, sampled: Mapping[str, Tensor]) -> None:
        written: dict[bytes, int] = {}
        with self._spool.open("ab") as spool:
            for module, sample in sampled.items():
                if not torch.isfinite(sample).all():
                    raise Refused(
                        f"{adapter.ref.id}: the inputs of module {module} are NaN or Inf when it is applied",
                        hint=remedy(dtype_name(self._dtype), "leave this adapter out"),
                    )
                data = sample.to(self._dtype).contiguous().view(torch.uint8).numpy().data
                digest = hashlib.sha256(data).digest()
                if digest not in written:
                    written[digest] = spool.tell()
                    spool.write(data)
                place = _Sample(written[digest], (sample.shape[0], sample.shape[1]))
                self._samples[adapter.ref.pinned, module] = place


def _end_of(item: Encoded) -> int:
    """The number of tokens before the end token of the completion."""
    return item.start + len(until_end(item.ids[item.start :], item.opening.ends))
