"""A fresh PEFT LoRA on a base model: its matrices, its parameters, and its files."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_cli.errors import Refused
from lora_cli.formats.base_names import split_revision
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.reader import OpenAdapter
from lora_cli.formats.skeleton import WEIGHT, Skeleton
from lora_cli.models.hf import peft, quiet
from lora_cli.names import leaf, leaves
from lora_cli.records import ALL_LINEAR


@dataclass(frozen=True, slots=True)
class Chosen:
    """The targets of a new LoRA: modules by name, and parameters that PEFT adapts without a layer of their own.

    `said` lists the targets and the matrices left out, by their last names; "" for the usual ones.
    """

    modules: str | list[str]
    parameters: list[str]
    said: str = ""


def choose(base: Skeleton, targets: str | Sequence[str], dropout: float) -> Chosen:
    """The matrices for `targets`, which are names of modules or "all-linear" (every linear layer but the output head).

    Fused experts are not layers, and PEFT has no dropout on them: "all-linear" adapts them only without dropout. The
    same holds for layers whose names PEFT takes for those of experts. Routers are never adapted.
    """
    if targets != ALL_LINEAR or not base.stacks:
        return Chosen(targets if isinstance(targets, str) else sorted(targets), [])
    layers = [name for name, matrix in base.matrices.items() if matrix.kind == "linear" and name != base.head]
    taken = [name for name in layers if leaf(name) in base.retargeted]
    modules, experts = sorted(set(layers) - set(taken)), [*base.stacks, *taken]
    bare = [name for name, matrix in base.matrices.items() if matrix.kind == "parameter"]
    routers = [name for name in bare if base.matrices[name].parameter == name + WEIGHT]
    if dropout:
        left = f"{_last_names(experts)} (PEFT has no dropout on fused experts: --dropout 0 adapts them)"
        return Chosen(modules, [], f"adapted: {_last_names(modules)}; not adapted: {left}, {_last_names(routers)}")
    parameters = sorted([*base.stacks, *(name + WEIGHT for name in taken)])
    said = f"adapted: {_last_names([*modules, *experts])}; not adapted: {_last_names(routers)}"
    return Chosen(modules, parameters, said)


def _last_names(names: Iterable[str]) -> str:
    return ", ".join(sorted(leaves(names)))


@contextmanager
def adapted(
    model: Any, chosen: Chosen, base: str, *, rank: int, alpha: float, dropout: float
) -> Iterator["NewAdapter"]:
    """While the block runs, `model` carries a fresh trainable LoRA; afterwards it is as before.

    Raises:
        Refused: no module of the base has one of the names, or PEFT cannot adapt one of them.
    """
    with quiet():
        config = peft().LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=chosen.modules,
            target_parameters=chosen.parameters or None,
            task_type="CAUSAL_LM",
        )
        try:
            wrapped: Any = peft().get_peft_model(model, config)
        except ValueError as error:
            hint = "name modules of this base with --target-modules"
            if "lora_dropout" in str(error):
                hint = "fused experts take no dropout: give --dropout 0, or leave them out of --target-modules"
            raise Refused(f"{base}: {error}", hint=hint) from error
    try:
        yield NewAdapter(wrapped, base, chosen)
    finally:
        with quiet():
            wrapped.unload()
        model.eval().requires_grad_(False)


class NewAdapter:
    """A LoRA in training; see `adapted`."""

    def __init__(self, wrapped: Any, base: str, chosen: Chosen) -> None:
        self._wrapped = wrapped
        self._base = base
        self.chosen = chosen

    @property
    def parameters(self) -> list[Tensor]:
        """The trainable factors, in a fixed order."""
        return [parameter for _, parameter in self._wrapped.named_parameters() if parameter.requires_grad]

    @contextmanager
    def dropout(self) -> Iterator[None]:
        """While the block runs, dropout is on."""
        self._wrapped.train()
        try:
            yield
        finally:
            self._wrapped.eval()

    def start_from(self, adapter: OpenAdapter) -> None:
        """Take over the factors of an adapter of this form, so that training goes on from there.

        Raises:
            Refused: the adapter is for another base, or has other modules, ranks or scales than this LoRA.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        if adapter.base != self._base:
            raise Refused(f"{adapter.ref.id} is an adapter of {adapter.base}, not of {self._base}")
        ours = get_peft_model_state_dict(self._wrapped, save_embedding_layers=False)
        theirs = load_file(adapter.files.weights)
        config = self._wrapped.peft_config["default"]
        same = {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
        if not same or {*adapter.scales.values()} != {config.lora_alpha / config.r}:
            raise Refused(
                f"{adapter.ref.id} has other modules, another rank or another alpha than the LoRA to be trained",
                hint="train with the options that it was trained with",
            )
        set_peft_model_state_dict(self._wrapped, theirs)

    def save(self, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT does; the card is left to the caller."""
        config = self._wrapped.peft_config["default"]
        config.base_model_name_or_path, revision = split_revision(self._base)
        config.revision = revision or None
        # Sort sets: their order would differ between two runs.
        config.target_modules = sorted(config.target_modules)
        config.target_parameters = sorted(config.target_parameters) if config.target_parameters else None
        with quiet():
            # Pass False: by default PEFT asks the Hub whether the base's vocabulary was changed.
            try:
                self._wrapped.save_pretrained(folder, save_embedding_layers=False)
            except SafetensorError as error:
                # The library tells the system's error in its text alone.
                if found := re.search(r"\(os error (\d+)\)", str(error)):
                    raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from error
                raise
        # safetensors lets nobody but the owner read its files, whatever the umask: a server may be another user.
        (folder / WEIGHTS_NAME).chmod((folder / CONFIG_NAME).stat().st_mode)
        (folder / "README.md").unlink(missing_ok=True)
