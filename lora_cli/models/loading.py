"""The parts of a base model from its files or the Hub, by transformers; failures become errors for the user.

Code that comes with a model is never run, pickles are never opened.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lora_cli.errors import AccessDenied, LoraError, NetworkError, NothingMatched, Refused
from lora_cli.formats.checkpoint import HubModel, cached_model, or_a_folder_like
from lora_cli.hub.client import Hub
from lora_cli.models.hf import hf, quiet
from lora_cli.models.skeleton import class_of, read_config

# Stop transformers from applying an adapter beside the model, and from asking the network for one.
_NO_ADAPTER: Mapping[str, Any] = {"local_files_only": True, "subfolder": "no-adapter"}
_LOADING_FAILS = (OSError, ValueError, KeyError, RuntimeError, ImportError)
_LOG_IN = "check the id; for a private one log in with 'hf auth login'"


def load_model(place: str, dtype: torch.dtype, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        place: a folder or a Hub id.
        options: `revision` and `local_files_only` of transformers' `from_pretrained`.

    Raises:
        AccessDenied, NetworkError, NothingMatched: the model cannot be downloaded.
        Refused: the model cannot be loaded, or its weights are incomplete.
    """
    with _translated(place):
        tokenizer, config = _tokenizer_and_config(place, options)
        model, report = class_of(config).from_pretrained(
            place,
            trust_remote_code=False,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            adapter_kwargs=_NO_ADAPTER,
            **options,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise Refused(
            f"{place}: {len(missing)} tensors are missing from its weights, such as {missing[0]}",
            hint="download the base model again",
        )
    return model, tokenizer


def load_tokenizer(place: str, options: Mapping[str, Any], *, named: str) -> tuple[Any, Any, Any]:
    """A model's tokenizer, configuration and generation configuration; `named` is the model in messages."""
    with _translated(named):
        tokenizer, config = _tokenizer_and_config(place, options)
        try:
            generation = hf.GenerationConfig.from_pretrained(place, **options)
        except OSError:
            generation = hf.GenerationConfig.from_model_config(config)
    return tokenizer, config, generation


def copy_of(model: HubModel) -> Path:
    """The folder in the Hub client's cache that has the name of the model's commit: of the copy that is here if it is
    complete, else of the revision's configuration, which is downloaded.
    """
    if cached := cached_model(*model):
        return cached
    with or_a_folder_like(model.repo):
        if not Hub().exists(model.repo):
            raise NothingMatched(f"no base model {model.repo}", hint=_LOG_IN)
        with _translated(str(model)):
            # Download by branch name, so that the cache records which commit the branch points to.
            found = hf.utils.cached_file(model.repo, "config.json", revision=model.revision)
    return Path(found).parent


def demand_causal(folder: Path, name: str) -> None:
    """Refused for a model that cannot continue a text; a configuration that cannot be read is left to `load_model`."""
    config = read_config(folder)
    if config is None:
        return
    cls = class_of(config)
    if cls is None or not cls.can_generate() or getattr(config, "is_encoder_decoder", False):
        kind = "not a model of transformers" if cls is None else f"a {cls.__name__}"
        raise Refused(
            f"{name} is {kind}, and no causal language model: it cannot continue a text",
            hint="give --base a causal language model; merge and bake take other models too",
        )


def _tokenizer_and_config(place: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    tokenizer = hf.AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    return tokenizer, hf.AutoConfig.from_pretrained(place, trust_remote_code=False, **options)


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Turn a failure of loading inside the block into an error for the user; leave bugs as they are."""
    try:
        with quiet():
            yield
    except Exception as error:
        if not isinstance(error, _LOADING_FAILS) and type(error).__name__ != "SafetensorError":
            raise
        raise _for_the_user(name, error) from error


def _for_the_user(name: str, error: Exception) -> LoraError:
    kinds: set[str] = set()
    link: BaseException | None = error
    while link is not None:
        kinds |= {kind.__name__ for kind in type(link).__mro__}
        link = link.__cause__ or link.__context__
    if kinds & {"GatedRepoError"}:
        return AccessDenied(f"{name} is gated", hint="ask for access on its page, then log in with 'hf auth login'")
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
        return NothingMatched(f"no base model {name}", hint=_LOG_IN)
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "HTTPError", "ConnectError", "TransportError"}:
        return NetworkError(f"{name} cannot be fetched: the Hub cannot be reached", hint="go online and run this again")
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return Refused(f"{name} cannot be loaded: {first}", hint="check the base model's files")
