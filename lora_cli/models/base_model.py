"""The only door to transformers and peft: load a base model, list its modules, apply adapters, loss, generate."""

import inspect
import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn

from lora_cli.algebra.devices import resolve_device
from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import AccessDenied, DataError, LoraError, NetworkError, NothingMatched, Refused, UsageError
from lora_cli.formats.base_names import public_base
from lora_cli.formats.checkpoint import HubModel, cached_model, folder_or_hub, or_a_folder_like, version_of_folder
from lora_cli.formats.skeleton import Matrix, Skeleton
from lora_cli.hub.client import Hub
from lora_cli.models.apply import Factors, Term, applied, as_change, as_term, fixed
from lora_cli.models.encode import Encoded, Encoder, Opening, encoder_of, until_end
from lora_cli.models.forms import Prompting
from lora_cli.models.new_adapter import NewAdapter, adapted, choose
from lora_cli.models.skeleton import class_of, quiet, read_config, skeleton_of
from lora_cli.precision import CHOICES, dtype_name, torch_dtype
from lora_cli.records import Example, Progress, Prompt, silent
from lora_cli.settings import folder_of

_hf: Any = transformers  # its annotations do not bear strict checking
_hf.utils.logging.set_verbosity_error()
_hf.utils.logging.disable_progress_bar()

_IGNORED = -100
_LOADING = "loading the base"
# Stop transformers from applying an adapter beside the model, and from asking the network for one.
_NO_ADAPTER: Mapping[str, Any] = {"local_files_only": True, "subfolder": "no-adapter"}
_LOADING_FAILS = (OSError, ValueError, KeyError, RuntimeError, ImportError)


@dataclass(frozen=True, slots=True)
class Generation:
    """The model's text after a prompt: the text, its number of tokens, and its share of the batch's seconds.

    `continues` is False if the text does not begin with the cut end of the prompt; see `Opening`.
    """

    text: str
    tokens: int
    seconds: float
    continues: bool = True


class BaseModel:
    """A frozen causal language model with its tokenizer. Updates are applied without touching its weights.

    Args:
        name: the user's name for the model, in messages and records.
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        version: identifies the model, whatever its name; see `BaseRef`.
        prompting: the form of prompts.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, version: str = "", prompting: Prompting | None = None
    ) -> None:
        self.name, self.version = name, version
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.encoder = encoder_of(name, tokenizer, model.config, model.generation_config, prompting)
        self.ends = self.encoder.ends
        # Padding is masked, so any known token will do.
        fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad: int = next(token for token in fillers if token is not None and token < self.encoder.vocabulary)
        # Drop the model's own generation settings (sampling, penalties): output must be greedy.
        model.generation_config = _hf.GenerationConfig(eos_token_id=self.ends, pad_token_id=self.pad)

    @property
    def pinned(self) -> str:
        """`name@version`: the key for results of this base."""
        return f"{self.name}@{self.version}"

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def dtype_name(self) -> str:
        """`dtype` as users spell it."""
        return dtype_name(self.dtype)

    @cached_property
    def skeleton(self) -> Skeleton:
        """Every matrix that can take an update, by name."""
        return skeleton_of(self.model)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer, by name."""
        return {name: matrix.shape for name, matrix in self.skeleton.matrices.items() if matrix.kind == "linear"}

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens of the generation prompt; see `Encoder.prompt_ids`."""
        return self.encoder.prompt_ids(prompt)

    def encode(self, example: Example) -> Encoded:
        """An example as this model reads it; see `Encoder.encode`."""
        return self.encoder.encode(example)

    def completion_losses(self, batch: Sequence[Encoded]) -> Tensor:
        """Negative log-likelihood in nats of each completion, summed over its tokens: (len(batch),) float32.

        Differentiable in the applied updates. Divide by `Encoded.tokens` for a mean per token.
        """
        tokens = self._filled(batch)
        labels = torch.full_like(tokens, _IGNORED)
        for row, item in enumerate(batch):
            labels[row, item.start : len(item.ids)] = torch.tensor(item.ids[item.start :])
        wanted = (labels[:, 1:] != _IGNORED).any(dim=0).nonzero().flatten()  # positions that predict a completion token
        labels = labels[:, 1:][:, wanted].to(self.device)
        logits = self._logits(tokens.to(self.device), wanted.to(self.device))  # (batch, wanted, vocabulary)
        flat = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_IGNORED, reduction="none"
        )
        return flat.view(labels.shape).sum(dim=1)

    def log_likelihoods(self, examples: Sequence[Example], *, batch_size: int = 16) -> list[float]:
        """`mean_log_likelihoods` of examples that are not encoded yet."""
        return self.mean_log_likelihoods([self.encode(example) for example in examples], batch_size=batch_size)

    @torch.no_grad()
    def mean_log_likelihoods(self, encoded: Sequence[Encoded], *, batch_size: int = 16) -> list[float]:
        """Mean log-likelihood per token of each completion (all of `Encoded.tokens`), in nats.

        Raises:
            Refused: one that is not finite.
        """
        found = [0.0] * len(encoded)
        for rows in _by_length([len(item.ids) for item in encoded], batch_size):
            losses = self.completion_losses([encoded[row] for row in rows]).tolist()
            for row, loss in zip(rows, losses, strict=True):
                if not math.isfinite(loss):
                    raise Refused(
                        f"the likelihood of example {encoded[row].id} is not finite in {self.dtype_name}",
                        hint="evaluate with --dtype fp32 or bf16, or leave this adapter out",
                    )
                found[row] = -loss / encoded[row].tokens
        return found

    def _filled(self, batch: Sequence[Encoded]) -> Tensor:
        """(len(batch), longest) token ids. A causal model never looks right, so this needs no attention mask."""
        tokens = torch.full((len(batch), max(len(item.ids) for item in batch)), self.pad)
        for row, item in enumerate(batch):
            tokens[row, : len(item.ids)] = torch.tensor(item.ids)
        return tokens

    def _logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if self._keeps_logits:
            return self.model(input_ids=tokens, use_cache=False, logits_to_keep=positions).logits  # type: ignore[no-any-return]
        return self.model(input_ids=tokens, use_cache=False).logits[:, positions]  # type: ignore[no-any-return]

    @cached_property
    def _keeps_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @torch.no_grad()
    def module_inputs(
        self,
        modules: Sequence[str],
        examples: Sequence[Encoded],
        places: Sequence[Sequence[int]],
        *,
        batch_size: int = 16,
    ) -> dict[str, Tensor]:
        """Each module's activations at some tokens of each example: (tokens, in) on the CPU, in this model's precision.

        Args:
            places: per example the indices of its tokens; rows come in the order of examples and places.

        Raises:
            Refused: a module does not see every token, as an expert of a mixture does not.
        """
        starts = [0, *itertools.accumulate(len(some) for some in places)]
        found: dict[str, Tensor] = {}
        for rows in _by_length([len(item.ids) for item in examples], batch_size):
            goes = torch.tensor([place for row in rows for place in range(starts[row], starts[row + 1])])
            fed = self._fed(modules, [examples[row] for row in rows], [places[row] for row in rows])
            for name, x in fed.items():
                found.setdefault(name, x.new_empty(starts[-1], x.shape[1]))[goes] = x
        return found

    def _fed(
        self, modules: Sequence[str], batch: Sequence[Encoded], places: Sequence[Sequence[int]]
    ) -> dict[str, Tensor]:
        tokens = self._filled(batch).to(self.device)
        flat = torch.tensor([row * tokens.shape[1] + place for row, some in enumerate(places) for place in some])
        heard: dict[str, Tensor] = {}

        def hear(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                x = arguments[0].flatten(0, -2)
                if len(x) == tokens.numel():
                    heard[name] = x[flat.to(x.device)].cpu()

            return take

        hooks = [self.model.get_submodule(name).register_forward_pre_hook(hear(name)) for name in modules]
        # Logits can need the most memory: run the head only if one of the modules is in it.
        below = f"{self.model.base_model_prefix}."
        model = self.model.base_model if all(name.startswith(below) for name in modules) else self.model
        try:
            model(input_ids=tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        if deaf := [name for name in modules if name not in heard]:
            raise Refused(
                f"{self.name}: {deaf[0]} does not see every token, so its activations cannot be sampled",
                hint="leave it out with --scope",
            )
        return heard

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 30, batch_size: int = 16) -> list[str]:
        """The greedy continuation of each prompt, in the order of the prompts."""
        texts = [""] * len(prompts)
        openings = [self.encoder.opening(prompt) for prompt in prompts]
        for row, generation in self.stream(openings, max_new_tokens=max_new_tokens, batch_size=batch_size):
            texts[row] = generation.text
        return texts

    def stream(
        self, openings: Sequence[Opening], *, max_new_tokens: int = 30, batch_size: int = 16
    ) -> Iterator[tuple[int, Generation]]:
        """Greedy continuations as (index of the opening, Generation), batch by batch.

        Openings that end alike share batches, the longest first.

        Raises:
            DataError: an opening with `max_new_tokens` more is longer than the model takes.
        """
        lengths = [len(opening.ids) for opening in openings]
        for row, length in enumerate(lengths):
            if length + max_new_tokens > self.encoder.longest:
                raise DataError(
                    f"prompt {row + 1} has {length} tokens and wants {max_new_tokens} new ones, "
                    f"{self.name} takes {self.encoder.longest} in all",
                    hint="lower --max-new-tokens or shorten the prompt",
                )
        for rows in _by_length(lengths, batch_size, [opening.ends for opening in openings]):
            began = time.perf_counter()
            outputs = self._greedy([openings[row] for row in rows], max_new_tokens)
            seconds = (time.perf_counter() - began) / len(rows)
            for row, output in zip(rows, outputs, strict=True):
                text, continues = self.encoder.written(openings[row], output)
                yield row, Generation(text, len(output), seconds, continues)

    @torch.no_grad()
    def _greedy(self, openings: Sequence[Opening], max_new_tokens: int) -> list[list[int]]:
        """The continuation of each opening; all openings have the same ends."""
        prompts, ends = [opening.ids for opening in openings], openings[0].ends
        width = max(len(ids) for ids in prompts)
        # New tokens are appended on the right, so prompts are filled up on the left, masked.
        tokens = torch.tensor([[self.pad] * (width - len(ids)) + [*ids] for ids in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=self.device)
        with quiet():
            written = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(ends),
            )
        return [list(until_end(row, ends)) for row in written[:, width:].tolist()]

    def check(self, shapes: Mapping[str, tuple[int, int]], who: str) -> None:
        """Refuse an update that does not fit: a matrix that is missing here or has another shape.

        Args:
            shapes: (out, in) of each matrix the update touches.
            who: the update's name in the message.
        """
        ours = {name: self.skeleton.get(name) for name in shapes}
        wrong = [name for name, matrix in ours.items() if matrix is None or matrix.shape != tuple(shapes[name])]
        if not wrong:
            return
        first, covered = wrong[0], len(shapes) - len(wrong)
        problem, here = f"no module {first}", ours[first]
        if here is not None:
            problem = f"{first} is {_times(here.shape)} here and {_times(shapes[first])} there"
        raise Refused(
            f"{who} does not fit {self.name}: {problem}; {covered} of {len(shapes)} modules match",
            hint="use the adapter with the base model it was trained on",
        )

    @contextmanager
    def attach(
        self,
        factors: Mapping[str, Factors],
        terms: Mapping[str, Term] | None = None,
        *,
        before: Callable[[], None] | None = None,
    ) -> Iterator[None]:
        """While the block runs, each named matrix has B·A added, with the factors of that moment.

        Args:
            factors: by matrix, a function that returns B and A in the model's precision, on its device.
            terms: by linear layer, a term for its output in place of one made of factors.
            before: runs before each pass.
        """
        made = dict(terms or {})
        by_parameter: dict[str, dict[str, Matrix]] = {}
        for name, one in factors.items():
            matrix = self.skeleton.get(name)
            assert matrix is not None
            if matrix.kind in ("linear", "embedding"):
                made[name] = as_term(self.model.get_submodule(name), matrix, one)
            else:
                by_parameter.setdefault(matrix.parameter, {})[name] = matrix
        changes = {
            parameter: as_change(self.model.get_parameter(parameter), matrices, factors)
            for parameter, matrices in by_parameter.items()
        }
        with applied(self.model, made, changes, before=before):
            yield

    @contextmanager
    def wear(self, updates: Mapping[str, LowRank] | None, *, who: str = "the adapter") -> Iterator[None]:
        """While the block runs, the base behaves as if each update were added to its weight; None adds nothing.

        Raises:
            Refused: a matrix does not exist here or has another shape.
        """
        shapes, factors = {}, {}
        # Iterate only once: each access may read an update from the disk.
        for name, update in (updates or {}).items():
            shapes[name] = update.shape
            factors[name] = fixed(update.to(self.device).to(self.dtype))
        self.check(shapes, who)
        with self.attach(factors):
            yield

    @contextmanager
    def new_adapter(
        self, *, rank: int, alpha: float, dropout: float, target_modules: str | Sequence[str], seed: int
    ) -> Iterator[NewAdapter]:
        """While the block runs, the base carries a fresh trainable PEFT LoRA; afterwards it is as before.

        Raises:
            Refused: no module of the base has one of the `target_modules` names.
        """
        chosen = choose(self.skeleton, target_modules, dropout)
        with ExitStack() as stack:
            with torch.random.fork_rng(devices=_cuda_devices(self.device)):
                torch.manual_seed(seed)
                new = adapted(self.model, chosen, self.name, rank=rank, alpha=alpha, dropout=dropout)
                adapter = stack.enter_context(new)
            yield adapter


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
    dtype: str
    prompting: Prompting = field(default_factory=Prompting)

    @property
    def settings(self) -> dict[str, Any]:
        """The base's part of a run's settings."""
        return {"base": self.name, "device": self.device, "dtype": self.dtype, **self.prompting.settings}

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
        options: dict[str, Any] = {"local_files_only": True}
        if folder_of(self.place) is None:
            # Use a copy on this machine as it is: no request, and the same base in later runs.
            options = {"local_files_only": cached_model(self.place, self.version) is not None, "revision": self.version}
        progress(_LOADING, 0, 0)
        try:
            with quiet():
                tokenizer = _hf.AutoTokenizer.from_pretrained(self.place, trust_remote_code=False, **options)
                config = _hf.AutoConfig.from_pretrained(self.place, trust_remote_code=False, **options)
                model, report = class_of(config).from_pretrained(
                    self.place,
                    trust_remote_code=False,
                    dtype=torch_dtype(self.dtype),
                    use_safetensors=True,
                    output_loading_info=True,
                    adapter_kwargs=_NO_ADAPTER,
                    **options,
                )
        except LoraError:
            raise
        except Exception as error:
            _translate(self.place, error)
        missing = sorted(report["missing_keys"])
        if missing:
            raise Refused(
                f"{self.place}: {len(missing)} tensors are missing from its weights, such as {missing[0]}",
                hint="download the base model again",
            )
        base = BaseModel(self.name, model.to(self.device), tokenizer, self.version, self.prompting)
        progress(_LOADING, 1, 1)
        return base


def pin(
    name_or_path: str,
    *,
    name: str = "",
    device: str = "auto",
    dtype: str = "auto",
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
    folder = found if isinstance(found, Path) else _copy_of(found)
    # Refuse before the weights are hashed, which can take a minute.
    _demand_causal(folder, name_or_path)
    return BaseRef(
        place=str(found) if isinstance(found, Path) else found.repo,
        name=name or public_base(name_or_path),
        version=version_of_folder(folder, progress) if folder is found else folder.name,
        device=device,
        dtype=dtype,
        prompting=prompting or Prompting(),
    )


def load(name_or_path: str, *, name: str = "", device: str = "auto", dtype: str = "auto") -> BaseModel:
    """`pin` and load at once."""
    return pin(name_or_path, name=name, device=device, dtype=dtype).load()


def load_encoder(name_or_path: str, *, prompting: Prompting | None = None) -> Encoder:
    """A base model's encoder, from its tokenizer and configuration, without its weights.

    Raises:
        NothingMatched, AccessDenied, NetworkError: no such base, or it cannot be downloaded.
        Refused: its tokenizer or configuration cannot be loaded. UsageError: see `Encoder`.
    """
    options: dict[str, Any] = {"local_files_only": True}
    found = folder_or_hub(name_or_path)
    place = str(found) if isinstance(found, Path) else found.repo
    if not isinstance(found, Path):
        here = cached_model(*found, weights=False)
        version = (here or _copy_of(found)).name
        options = {"local_files_only": here is not None, "revision": version}
    try:
        with quiet():
            tokenizer = _hf.AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
            config = _hf.AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
            try:
                generation = _hf.GenerationConfig.from_pretrained(place, **options)
            except OSError:
                generation = _hf.GenerationConfig.from_model_config(config)
    except Exception as error:
        _translate(name_or_path, error)
    return encoder_of(public_base(name_or_path), tokenizer, config, generation, prompting)


def resolve(device: str = "auto", dtype: str = "auto") -> tuple[str, str]:
    """The device and the precision on this machine.

    Args:
        device: cpu, cuda, cuda:N or mps; "auto" is cuda if there is one, else cpu.
        dtype: fp32, bf16 or fp16; "auto" is bf16 on cuda and fp32 elsewhere.

    Raises:
        UsageError: an unknown name. Refused: this machine lacks the device.
    """
    if dtype not in CHOICES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of {', '.join(CHOICES)}")
    device = resolve_device(device)
    if dtype == "auto":
        dtype = "bf16" if device.startswith("cuda") else "fp32"
    return device, dtype


def _by_length(lengths: Sequence[int], batch_size: int, kinds: Sequence[Hashable] = ()) -> Iterator[list[int]]:
    """Rows in batches, the longest first; only rows of one kind share a batch."""
    groups: dict[Hashable, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        groups.setdefault(kinds[row] if kinds else None, []).append(row)
    for order in groups.values():
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def _times(shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}"


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _copy_of(model: HubModel) -> Path:
    """The folder in the Hub client's cache that has the name of the model's commit: of the copy that is here if it is
    complete, else of the revision's configuration, which is downloaded.
    """
    if cached := cached_model(*model):
        return cached
    with or_a_folder_like(model.repo):
        if not Hub().exists(model.repo):
            raise NothingMatched(
                f"no base model {model.repo}", hint="check the id; for a private one log in with 'hf auth login'"
            )
        try:
            # Download by branch name, so that the cache records which commit the branch points to.
            found = _hf.utils.cached_file(model.repo, "config.json", revision=model.revision)
        except Exception as error:
            _translate(str(model), error)
    return Path(found).parent


def _demand_causal(folder: Path, name: str) -> None:
    """Refused for a model that cannot continue a text; a configuration that cannot be read is left to `load`."""
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


def _translate(name: str, error: Exception) -> NoReturn:
    """Turn a failure of loading into an error for the user; raise bugs unchanged."""
    if not isinstance(error, _LOADING_FAILS) and type(error).__name__ != "SafetensorError":
        raise error
    kinds: set[str] = set()
    link: BaseException | None = error
    while link is not None:
        kinds |= {kind.__name__ for kind in type(link).__mro__}
        link = link.__cause__ or link.__context__
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raised: LoraError
    if kinds & {"GatedRepoError"}:
        raised = AccessDenied(f"{name} is gated", hint="ask for access on its page, then log in with 'hf auth login'")
    elif kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
        raised = NothingMatched(
            f"no base model {name}", hint="check the id; for a private one log in with 'hf auth login'"
        )
    elif kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "HTTPError", "ConnectError", "TransportError"}:
        raised = NetworkError(
            f"{name} cannot be fetched: the Hub cannot be reached", hint="go online and run this again"
        )
    else:
        raised = Refused(f"{name} cannot be loaded: {first}", hint="check the base model's files")
    raise raised from error
