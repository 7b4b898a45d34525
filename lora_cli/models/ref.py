"""A base model at one version: pinned before it is loaded, and loaded as it was pinned."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.algebra.devices import resolve_device
from lora_cli.errors import UsageError
from lora_cli.formats.base_names import public_base
from lora_cli.formats.checkpoint import cached_model, folder_or_hub, open_checkpoint, version_of_folder
from lora_cli.formats.skeleton import Skeleton
from lora_cli.hub.client import Hub
from lora_cli.models import four_bit
from lora_cli.models.base_model import BaseModel
from lora_cli.models.download import copy_of, download_base
from lora_cli.models.encode import Encoder, encoder_of
from lora_cli.models.forms import Prompting
from lora_cli.models.loading import demand_causal, load_model, load_tokenizer
from lora_cli.models.skeleton import skeleton
from lora_cli.precision import FOUR_BIT, LOADED, Loading, torch_dtype
from lora_cli.records import Progress, silent
from lora_cli.settings import folder_of

_LOADING = "loading the base"
_Parts = tuple[Any, Any, Skeleton | None]
_held: ContextVar[dict[object, _Parts] | None] = ContextVar("held", default=None)


@contextmanager
def loaded_once() -> Iterator[None]:
    """While the block runs, the last base that was loaded is kept, and lent to every load of the same version."""
    token = _held.set({})
    try:
        yield
    finally:
        _held.reset(token)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRef:
    """A base model at one version, with device, precision and prompting fixed; its weights are not loaded.

    `place` is a folder or a Hub id; `name` is the base's name in records and messages. `version` has 40 hex digits: the
    commit on the Hub; for a folder the head of a SHA-256 over the files that loading reads. `device` and `dtype` are
    resolved for this machine, never "auto". `prompting` is the form of prompts.
    """

    place: str
    name: str
    version: str
    device: str
    dtype: Loading
    prompting: Prompting = field(default_factory=Prompting)

    @property
    def settings(self) -> dict[str, Any]:
        """The base's part of a run's settings."""
        quantiser = {"bitsandbytes": four_bit.version()} if self.four_bit else {}
        return {"base": self.name, "device": self.device, "dtype": self.dtype, **quantiser, **self.prompting.settings}

    @property
    def four_bit(self) -> bool:
        """Whether its linear layers are held in 4 bits."""
        return self.dtype == FOUR_BIT

    @property
    def compute(self) -> str:
        """The precision of its arithmetic, and of what is not held in 4 bits."""
        return _usual(self.device) if self.four_bit else self.dtype

    @property
    def inputs(self) -> dict[str, str]:
        """The base's part of a run's inputs."""
        return {f"base:{self.name}@{self.version}": self.version}

    def load(self, progress: Progress = silent) -> BaseModel:
        """Load the model. Code that comes with a model is never run, pickles are never opened.

        Raises:
            AccessDenied, NetworkError: the model cannot be downloaded.
            Refused: the model cannot be loaded, or its weights are incomplete.
        """
        held, key = _held.get(), (self.place, self.version, self.device, self.dtype)
        parts = None if held is None else held.get(key)
        if parts is None:
            if held is not None:
                held.clear()  # before the next one takes as much memory
            parts = self._parts(progress)
            if held is not None:
                held[key] = parts
        model, tokenizer, shapes = parts
        return BaseModel(self.name, model, tokenizer, self.version, self.prompting, shapes)

    def _parts(self, progress: Progress) -> _Parts:
        """The model on its device, and its tokenizer."""
        # Use a copy on this machine as it is: no request, and the same base in later runs.
        folder = folder_of(self.place) or cached_model(self.place, self.version)
        if folder is None:
            folder = download_base(Hub(progress=progress), self.place, self.version, progress=progress)
        progress(_LOADING, 0, 0)
        dtype = torch_dtype(self.compute)
        model, tokenizer = load_model(folder, dtype, named=self.name, device=self.device, four_bit=self.four_bit)
        shapes = skeleton(folder) if four_bit.is_four_bit(model) else None
        model = model.to(self.device)
        progress(_LOADING, 1, 1)
        return model, tokenizer, shapes


def pin(
    name_or_path: str,
    *,
    name: str = "",
    device: str = "auto",
    dtype: Loading = "auto",
    prompting: Prompting | None = None,
    progress: Progress = silent,
) -> BaseRef:
    """Pin a base model without loading it. Hashing the weights of a folder takes about a second per gigabyte.

    Args:
        name: the base's name in records and messages; by default `public_base(name_or_path)`.
        device, dtype: see `resolve`.
        prompting: the form of prompts; by default the base's own.

    Raises:
        NothingMatched, AccessDenied, NetworkError: no such base, or the Hub cannot be asked for its commit.
        Refused: not a causal language model. UsageError, Refused: see `resolve`.
    """
    device, dtype = resolve(device, dtype)
    found = folder_or_hub(name_or_path)
    folder = found if isinstance(found, Path) else copy_of(found)
    # Refuse before the weights are hashed, which can take a minute.
    demand_causal(folder, name_or_path)
    if isinstance(found, Path) or cached_model(*found):
        open_checkpoint(folder, name_or_path)
    return BaseRef(
        place=str(found) if isinstance(found, Path) else found.repo,
        name=name or public_base(name_or_path),
        version=version_of_folder(folder, progress) if folder is found else folder.name,
        device=device,
        dtype=dtype,
        prompting=prompting or Prompting(),
    )


def load(name_or_path: str, *, name: str = "", device: str = "auto", dtype: Loading = "auto") -> BaseModel:
    """`pin` and load at once."""
    return pin(name_or_path, name=name, device=device, dtype=dtype).load()


def load_encoder(name_or_path: str, *, prompting: Prompting | None = None) -> Encoder:
    """A base model's encoder, from its tokenizer and configuration, without its weights.

    Raises:
        NothingMatched, AccessDenied, NetworkError: no such base, or it cannot be downloaded.
        Refused: its tokenizer or configuration cannot be loaded. UsageError: see `Encoder`.
    """
    found = folder_or_hub(name_or_path)
    if isinstance(found, Path):
        folder = found
    else:
        folder = cached_model(*found, weights=False) or download_base(Hub(), *found, weights=False)
    tokenizer, config, generation = load_tokenizer(folder, named=name_or_path)
    return encoder_of(public_base(name_or_path), tokenizer, config, generation, prompting)


def resolve(device: str = "auto", dtype: Loading = "auto") -> tuple[str, Loading]:
    """The device and the precision on this machine.

    Args:
        device: cpu, cuda, cuda:N or mps; "auto" is cuda if there is one, else cpu.
        dtype: fp32, bf16, fp16 or 4bit; "auto" is bf16 on cuda and fp32 elsewhere.

    Raises:
        UsageError: an unknown name, or 4bit without bitsandbytes. Refused: this machine lacks the device.
    """
    if dtype not in LOADED:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of {', '.join(LOADED)}")
    device = resolve_device(device)
    if dtype == FOUR_BIT:
        four_bit.version()
    return device, _usual(device) if dtype == "auto" else dtype


def _usual(device: str) -> Loading:
    return "bf16" if device.startswith("cuda") else "fp32"
