"""The parts of a base model from the files in its folder, by transformers; failures become errors for the user.

Code that comes with a model is never run, pickles are never opened, and no file is read that the base's version does
not cover; see `staged`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lora_cli.errors import LoraError, Refused, shortage
from lora_cli.formats.base_files import AGAIN, OBJECTS, json_object
from lora_cli.formats.checkpoint import open_checkpoint
from lora_cli.models.four_bit import keep_layout, quantisation
from lora_cli.models.hf import hf, quiet
from lora_cli.models.skeleton import class_of, config_of, demand_filled, skeleton
from lora_cli.models.staged import staged
from lora_cli.text import counted

_OWN: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_model(
    folder: Path, dtype: torch.dtype, *, named: str, device: str = "cpu", four_bit: bool = False
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        named: the model in messages.
        device: that of a quantised model; others are on the CPU.
        four_bit: hold its linear layers in 4 bits; see `models.four_bit`.

    Raises:
        Refused: the model cannot be loaded, its weights are incomplete, or it is quantised already.
        DataError: a file that cannot be read.
    """
    checkpoint = open_checkpoint(folder, named)
    demand_filled(folder, checkpoint, named)
    stored = checkpoint.config.get("quantization_config")
    if four_bit and stored:
        raise Refused(f"{named} is stored quantised already", hint="leave out --dtype 4bit")
    # Layers are quantised one by one as they are read, on the device: the whole model is never there in full.
    how: dict[str, Any] = {"device_map": {"": device}} if four_bit or stored else {}
    if four_bit and (built := skeleton(folder)) is not None:
        how["quantization_config"] = quantisation(built, dtype)
    with staged(folder, named, weights=checkpoint.headers) as place, quiet():
        tokenizer, config = _tokenizer_and_config(place, named)
        with _translated("weights", place, named):
            model, report = class_of(config).from_pretrained(
                place,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **how,
                **_OWN,
            )
    keep_layout(model, named)
    for name, found, wanted in sorted(report["mismatched_keys"])[:1]:
        raise Refused(
            f"{named}: {name} is {list(found)} in its weights and {list(wanted)} by its config.json", hint=AGAIN
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise Refused(
            f"{named}: {counted(len(missing), 'tensor')} missing from its weights, such as {missing[0]}", hint=AGAIN
        )
    return model, tokenizer


def load_tokenizer(folder: Path, *, named: str) -> tuple[Any, Any, Any]:
    """A model's tokenizer, configuration and generation configuration; `named` is the model in messages."""
    with staged(folder, named) as place, quiet():
        tokenizer, config = _tokenizer_and_config(place, named)
        with _translated("generation_config.json", place, named):
            try:
                generation = hf.GenerationConfig.from_pretrained(place, local_files_only=True)
            except OSError:
                generation = hf.GenerationConfig.from_model_config(config)
    return tokenizer, config, generation


def demand_causal(folder: Path, name: str) -> None:
    """Refused for a model that cannot continue a text, or whose configuration cannot be read."""
    with staged(folder, name, config_alone=True) as place, quiet(), _translated("config.json", place, name):
        config = config_of(place)
        cls = class_of(config)
        if cls is None or not cls.can_generate() or getattr(config, "is_encoder_decoder", False):
            kind = "not a model of transformers" if cls is None else f"a {cls.__name__}"
            raise Refused(
                f"{name} is {kind}, and no causal language model: it cannot continue a text",
                hint="give --base a causal language model; merge and bake take other models too",
            )


def _tokenizer_and_config(place: Path, named: str) -> tuple[Any, Any]:
    with _translated("config.json", place, named):
        config = config_of(place)
        # transformers knows some models by their name.
        config.name_or_path = named
    with _translated("tokenizer", place, named):
        return hf.AutoTokenizer.from_pretrained(place, config=config, **_OWN), config


@contextmanager
def _translated(what: str, place: Path, named: str) -> Iterator[None]:
    """Turn a failure of loading inside the block into an error for the user: a base's files may hold anything."""
    try:
        yield
    except LoraError:
        raise
    except Exception as error:
        if shortage(error):
            raise
        for file in (place / name for name in OBJECTS):
            if file.exists():
                json_object(file, named)
        said = " ".join(str(error).replace(f"{place}/", "").replace(str(place), named).split())
        kind = "" if isinstance(error, OSError | ValueError | RuntimeError) and said else f"{type(error).__name__}: "
        raise Refused(
            f"{named}: its {what} cannot be loaded: {kind}{_cut(said)}", hint="check the base model's files"
        ) from error


def _cut(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
