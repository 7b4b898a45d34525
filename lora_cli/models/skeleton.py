"""The skeleton of a base model: its own class built on the meta device, from a configuration alone.

The mapping from names to modules comes from transformers (`conversion_mapping.py`: the renamings that loading applies
to checkpoints) and from PEFT (`utils/transformers_weight_conversion.py`: which of them it applies to adapters).
"""

import functools
import itertools
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import LoraError, Refused
from lora_cli.formats.base_files import AGAIN, CONFIG
from lora_cli.formats.checkpoint import Checkpoint
from lora_cli.formats.skeleton import WEIGHT, Kind, Matrix, Skeleton, Stack
from lora_cli.hashes import Stamp, stamp_of
from lora_cli.models.hf import hf, peft, quiet
from lora_cli.models.staged import staged
from lora_cli.models.stored import stored
from lora_cli.names import leaves

_MOST_MODULES = 120_000
# Numbers in one entry of a packed tensor, at most; numbers that a class makes itself, such as tables of positions.
_MOST_PACKED = 32
_SLACK = 1 << 27
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def skeleton(folder: Path) -> Skeleton | None:
    """The skeleton of the model whose config.json is in `folder`; None if transformers has no class for it.

    Raises:
        Refused, DataError: a configuration that cannot be read, with sizes that no model has, or with too many modules.
    """
    # The file itself may be a link to a blob of the Hub client's cache.
    return _built(folder.resolve(), stamp_of(folder / CONFIG))


@functools.lru_cache(maxsize=8)
def _built(folder: Path, state: Stamp) -> Skeleton | None:
    with staged(folder, folder.name, config_alone=True) as place:
        try:
            with quiet():
                config = config_of(place)
                cls = class_of(config)
                if cls is None:
                    return None
                with torch.device("meta"), _few_modules(folder.name):
                    return skeleton_of(cls(config))
        except LoraError:
            raise
        except Exception:  # a configuration may hold anything, and each class fails in its own way
            return None


def config_of(place: Path) -> Any:
    """The configuration in a staged folder, as transformers has it; any exception if it cannot be read."""
    return hf.AutoConfig.from_pretrained(str(place), trust_remote_code=False, local_files_only=True)


@contextmanager
def _few_modules(name: str) -> Iterator[None]:
    """Refused once more than `_MOST_MODULES` modules are made in the block: each costs time and memory."""
    made = itertools.count(1)

    def tally(*_: Any) -> None:
        if next(made) > _MOST_MODULES:
            raise Refused(f"{name}: {CONFIG} describes a model of more than {_MOST_MODULES:,} modules", hint=AGAIN)

    handle = register_module_module_registration_hook(tally)
    try:
        yield
    finally:
        handle.remove()


def demand_filled(folder: Path, checkpoint: Checkpoint, name: str) -> None:
    """Refused for a configuration that describes a far larger model than the weights hold: it would fill memory."""
    built = skeleton(folder)
    if built is None:
        return
    entries = [entry for header in checkpoint.headers.values() for entry in header.tensors.values()]
    per_entry = _MOST_PACKED if checkpoint.config.get("quantization_config") else 2
    held = sum(math.prod(entry.shape) for entry in entries)
    if built.numbers > per_entry * held + _SLACK:
        raise Refused(
            f"{name}: config.json describes a model of {built.numbers:,} numbers, its weights hold {held:,}", hint=AGAIN
        )


def class_of(config: Any) -> Any:
    """The class in `architectures`; if it is not a class of transformers, the causal language model's."""
    for name in config.architectures or ():
        cls = getattr(hf, name, None) if isinstance(name, str) else None
        if isinstance(cls, type) and issubclass(cls, hf.PreTrainedModel):
            return cls
    for mapping in (hf.MODEL_FOR_CAUSAL_LM_MAPPING, hf.MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    return None


def skeleton_of(model: Any) -> Skeleton:
    """The skeleton of an existing model, with or without weights."""
    transforms = _transforms(model)
    renames, retargeted = _peft_tables(model.config.model_type)
    matrices: dict[str, Matrix] = {}
    stacks: dict[str, Stack] = {}
    others: list[str] = []
    for name, module in model.named_modules():
        own = _matrix(name, module)
        if own is not None:
            matrices[name] = own
            continue
        others.append(name)
        for last, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{last}" if name else last
            if parameter.ndim == 2 and name:
                matrices[full.removesuffix(WEIGHT)] = Matrix(
                    "parameter", tuple(parameter.shape), full, tuple(parameter.shape)
                )
            elif parameter.ndim == 3 and name and min(parameter.shape) > 1:
                stacks[full] = _stack(full, module, parameter, transforms)
    return Skeleton(
        architecture=type(model).__name__,
        numbers=sum(tensor.numel() for tensor in itertools.chain(model.parameters(), model.buffers())),
        matrices=matrices,
        stacks=stacks,
        others=frozenset(leaves(others)),
        attentions=frozenset(n for n, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)),
        prefix=model.base_model_prefix,
        decoder="" if getattr(model.config, "is_encoder_decoder", False) else _name_of(model, "get_decoder"),
        head=_name_of(model, "get_output_embeddings"),
        ties=_ties(model),
        peft_renames=renames,
        retargeted=retargeted,
        renamed=functools.partial(_renamed, model),
        stored=functools.partial(stored, model),
    )


def _matrix(name: str, module: nn.Module) -> Matrix | None:
    weight = getattr(module, "weight", None)
    if not name or not isinstance(weight, torch.Tensor):
        return None
    stored, parameter = tuple(weight.shape), f"{name}{WEIGHT}"
    if isinstance(module, nn.Linear):
        kind: Kind = "linear" if _gives_a_tensor(module) else "parameter"
        return Matrix(kind, (stored[0], stored[1]), parameter, stored)
    if isinstance(module, Conv1D):
        return Matrix("linear", (stored[1], stored[0]), parameter, stored, transposed=True)
    if isinstance(module, nn.Embedding):
        return Matrix("embedding", (stored[1], stored[0]), parameter, stored, transposed=True)
    if isinstance(module, _CONVOLUTIONS) and module.groups == 1:
        return Matrix("conv", (stored[0], weight[0].numel()), parameter, stored)
    return None


def _gives_a_tensor(module: nn.Linear) -> bool:
    """Whether an update can be added to its output: a subclass may return more than a tensor, as routers do."""
    if type(module).forward is nn.Linear.forward:
        return True
    try:
        with torch.no_grad():
            return isinstance(module(module.weight.new_empty(1, module.in_features)), torch.Tensor)
    except Exception:  # a class may want other inputs, and each fails in its own way
        return False


def _ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Module → the other modules that share its weight."""
    sharing: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(WEIGHT):
            sharing.setdefault(id(parameter), []).append(name.removesuffix(WEIGHT))
    groups = [names for names in sharing.values() if len(names) > 1]
    return {one: tuple(other for other in names if other != one) for names in groups for one in names}


def _stack(name: str, module: nn.Module, parameter: torch.Tensor, transforms: list[Any]) -> Stack:
    experts, first, second = parameter.shape
    if getattr(module, "is_transposed", False):
        return Stack(experts, (second, first), transposed=True)
    return Stack(experts, (first, second), parts=_parts(name, transforms))


def _parts(name: str, transforms: list[Any]) -> tuple[str, ...]:
    """The last names of the shares of one expert's matrix in a checkpoint."""
    for transform in transforms:
        operations = [type(operation).__name__ for operation in getattr(transform, "operations", ())]
        if operations[:1] != ["MergeModulelist"] or operations[1:] not in ([], ["Concatenate"]):
            continue
        if name.endswith(_plain(transform.target_patterns[0])):
            return tuple(_plain(source).rpartition("*.")[2] for source in transform.source_patterns)
    return ()


def _plain(pattern: str) -> str:
    """A pattern of these tables as a plain name."""
    return pattern.replace("\\", "").strip("^$").removesuffix(WEIGHT)


def _transforms(model: Any) -> list[Any]:
    """The conversions of a checkpoint's tensors on loading this class, in order."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: list[Any] = get_model_conversion_mapping(model, add_legacy=False)
    return found


def _renamed(model: Any, names: Collection[str], ending: str) -> dict[str, str]:
    """Each of `names` as loading renames the tensor name + `ending`, without the ending."""
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [one for one in _transforms(model) if isinstance(one, WeightRenaming)]
    found = {name: rename_source_key(name + ending, renamings, [])[0] for name in names}
    return {name: new.removesuffix(ending) for name, new in found.items() if new.endswith(ending)}


def _peft_tables(model_type: str) -> tuple[bool, frozenset[str]]:
    """Whether PEFT renames adapters of this kind of model, and the target names it takes for parts of the experts."""
    tables = peft(".utils.transformers_weight_conversion")
    if tables.get_checkpoint_conversion_mapping(model_type) is None:
        return False, frozenset()
    kind = tables._MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
    return True, frozenset(tables._MOE_TARGET_MODULE_MAPPING.get(kind, ()))


def _name_of(model: Any, getter: str) -> str:
    """The name of the module that a method of the model returns, "" if it returns none."""
    try:
        wanted = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return ""
    return next((name for name, module in model.named_modules() if module is wanted), "")
