"""The only door to transformers and peft: load a base model, know its modules, wear adapters, loss, generate."""

import inspect
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.base_names import MAIN, public_base, split_revision
from lora_cli.adapters.checkpoint import HubModel, cached_model, folder_or_hub, version_of_folder
from lora_cli.adapters.devices import resolve_device
from lora_cli.adapters.lowrank import LowRank
from lora_cli.errors import AccessDenied, DataError, LoraError, NetworkError, NothingMatched, Refused, UsageError
from lora_cli.hub import Hub
from lora_cli.records import Example
from lora_cli.settings import folder_of

_hf: Any = transformers  # its annotations do not bear strict checking
_hf.utils.logging.set_verbosity_error()
_hf.utils.logging.disable_progress_bar()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEVEN_LINEAR = "all-linear"
_IGNORED = -100
# transformers would wear an adapter that it finds beside a model, and ask the network whether there is one.
_NO_ADAPTER: Mapping[str, Any] = {"local_files_only": True, "subfolder": "no-adapter"}
_LOADING_FAILS = (OSError, ValueError, KeyError, RuntimeError, ImportError)

Term = Callable[[Tensor, Tensor], Tensor]
"""Called as term(input, output) of a module, (…, in) and (…, out); returns what the module's output becomes."""

Prompt = str | tuple[Mapping[str, str], ...]


class Encoded(NamedTuple):
    """An example as token ids; the completion (with its end token) begins at `start`."""

    ids: tuple[int, ...]
    start: int

    @property
    def tokens(self) -> int:
        """How many completion tokens the loss covers."""
        return len(self.ids) - self.start


@dataclass(frozen=True, slots=True)
class Generation:
    """What the model wrote after a prompt: the text, its number of tokens, and its share of the batch's seconds."""

    text: str
    tokens: int
    seconds: float


class BaseModel:
    """A frozen causal language model with its tokenizer, on which updates are worn without touching its weights.

    Args:
        name: how the user calls it; goes into messages and records.
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        version: tells this very model from any other, under whatever name; see `BaseRef`.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, version: str = "") -> None:
        self.name, self.version = name, version
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        ends = model.generation_config.eos_token_id
        self.ends: list[int] = sorted(
            {*([ends] if isinstance(ends, int) else ends or []), *filter(None, [tokenizer.eos_token_id])}
        )
        if tokenizer.eos_token_id is None:
            raise Refused(f"{name}: its tokenizer has no end-of-sequence token", hint="choose another base model")
        pad = tokenizer.pad_token_id
        self.pad: int = tokenizer.eos_token_id if pad is None else pad
        # What a model suggests for chatting (sampling, penalties) would make its output no longer the greedy one.
        model.generation_config = _hf.GenerationConfig(eos_token_id=self.ends, pad_token_id=self.pad)

    @property
    def pinned(self) -> str:
        """`name@version`: what results of this base are kept under."""
        return f"{self.name}@{self.version}"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def dtype_name(self) -> str:
        """`dtype` as users spell it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every module that can wear an update, by name."""
        return _shapes(self.model)

    @cached_property
    def longest(self) -> int:
        """The most tokens the model takes; a very large number when it does not say."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else 1 << 30

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens before the completion: the chat template around the prompt where there is one, else plain text.

        Raises:
            DataError: a chat, but this base has no chat template, or one that refuses it.
        """
        if self.tokenizer.chat_template is None:
            if not isinstance(prompt, str):
                raise DataError(
                    f"{self.name} has no chat template, which examples with messages need",
                    hint='use {"prompt", "completion"} examples or the instruction-tuned base',
                )
            return list(self.tokenizer(prompt)["input_ids"])
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        try:
            return list(self.tokenizer.apply_chat_template(turns, **options)["input_ids"])
        except Exception as error:
            if "TemplateError" not in {kind.__name__ for kind in type(error).__mro__}:
                raise
            roles = ", ".join(str(turn["role"]) for turn in turns)
            raise DataError(
                f"the chat template of {self.name} refuses an example with the roles {roles}: {error}",
                hint="write the examples' messages as this base was trained on them",
            ) from error

    def encode(self, example: Example) -> Encoded:
        """Prompt and completion tokenised apart, so that the boundary is exact, then the end token.

        Raises:
            DataError: the example is longer than the model takes.
        """
        prompt = self.prompt_ids(example.prompt)
        completion = self.tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        ids = (*prompt, *completion, self.tokenizer.eos_token_id)
        if len(ids) > self.longest:
            raise DataError(
                f"example {example.id} has {len(ids)} tokens, {self.name} takes {self.longest}",
                hint="shorten or remove the example",
            )
        return Encoded(ids, len(prompt))

    def completion_losses(self, batch: Sequence[Encoded]) -> Tensor:
        """Negative log-likelihood in nats of each completion, summed over its tokens: (len(batch),) float32.

        Differentiable in whatever the base wears. Divide by `Encoded.tokens` for a mean per token.
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

    @torch.no_grad()
    def log_likelihoods(self, examples: Sequence[Example], *, batch_size: int = 16) -> list[float]:
        """Mean log-likelihood per completion token (the end token included) of each example, in nats.

        Raises:
            Refused: one that is not finite.
        """
        encoded = [self.encode(example) for example in examples]
        found = [0.0] * len(encoded)
        for rows in _by_length([len(item.ids) for item in encoded], batch_size):
            losses = self.completion_losses([encoded[row] for row in rows]).tolist()
            for row, loss in zip(rows, losses, strict=True):
                if not math.isfinite(loss):
                    raise Refused(
                        f"the likelihood of example {examples[row].id} is not finite in {self.dtype_name}",
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
        """What each module is fed at some tokens of each example: (tokens, in) on the CPU, in this model's precision.

        Args:
            places: per example the indices of those tokens; rows come in the order of examples and places.

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
        # Logits can outweigh all else: the head runs only where one of the modules is in it.
        below = f"{self.model.base_model_prefix}."
        model = self.model.base_model if all(name.startswith(below) for name in modules) else self.model
        try:
            model(input_ids=tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        if deaf := [name for name in modules if name not in heard]:
            raise Refused(
                f"{self.name}: {deaf[0]} is not fed every token, so its inputs cannot be sampled",
                hint="leave it out with --scope",
            )
        return heard

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 30, batch_size: int = 16) -> list[str]:
        """The greedy continuation of each prompt, in the order of the prompts."""
        texts = [""] * len(prompts)
        for row, generation in self.stream(prompts, max_new_tokens=max_new_tokens, batch_size=batch_size):
            texts[row] = generation.text
        return texts

    def stream(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 30, batch_size: int = 16
    ) -> Iterator[tuple[int, Generation]]:
        """Greedy continuations as (index of the prompt, Generation), batch by batch, longest prompts first.

        Raises:
            DataError: a prompt with `max_new_tokens` more is longer than the model takes.
        """
        encoded = [self.prompt_ids(prompt) for prompt in prompts]
        for row, ids in enumerate(encoded):
            if len(ids) + max_new_tokens > self.longest:
                raise DataError(
                    f"prompt {row + 1} has {len(ids)} tokens and wants {max_new_tokens} new ones, "
                    f"{self.name} takes {self.longest} in all",
                    hint="lower --max-new-tokens or shorten the prompt",
                )
        for rows in _by_length([len(ids) for ids in encoded], batch_size):
            began = time.perf_counter()
            outputs = self._greedy([encoded[row] for row in rows], max_new_tokens)
            seconds = (time.perf_counter() - began) / len(rows)
            for row, output in zip(rows, outputs, strict=True):
                text = self.tokenizer.decode(output, skip_special_tokens=True)
                yield row, Generation(text, len(output), seconds)

    @torch.no_grad()
    def _greedy(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        width = max(len(ids) for ids in prompts)
        # New tokens are appended on the right, so prompts are filled up on the left, masked.
        tokens = torch.tensor([[self.pad] * (width - len(ids)) + ids for ids in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=self.device)
        with _silence():
            written = self.model.generate(
                input_ids=tokens, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens
            )
        return [self._until_end(row) for row in written[:, width:].tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        for place, token in enumerate(ids):
            if token in self.ends:
                return ids[:place]
        return ids

    def check(self, shapes: Mapping[str, tuple[int, int]], who: str) -> None:
        """Refuse an update that does not fit: a module that is missing here or has another shape.

        Args:
            shapes: (out, in) of each module the update touches.
            who: what to call the update in the message.
        """
        wrong = [module for module, shape in shapes.items() if self.shapes.get(module) != tuple(shape)]
        if not wrong:
            return
        first, covered = wrong[0], len(shapes) - len(wrong)
        ours = self.shapes.get(first)
        problem = f"no module {first}"
        if ours is not None:
            problem = f"{first} is {_times(ours)} here and {_times(shapes[first])} there"
        raise Refused(
            f"{who} does not fit {self.name}: {problem}; {covered} of {len(shapes)} modules match",
            hint="use the adapter with the base model it was trained on",
        )

    @contextmanager
    def attach(self, terms: Mapping[str, Term], *, before: Callable[[], None] | None = None) -> Iterator[None]:
        """While the block runs, each named module's output goes through its term; `before` runs ahead of each pass."""
        hooks = [self.model.get_submodule(name).register_forward_hook(_hook(term)) for name, term in terms.items()]
        if before is not None:
            hooks.append(self.model.register_forward_pre_hook(lambda module, arguments: before()))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def wear(self, updates: Mapping[str, LowRank] | None, *, who: str = "the adapter") -> Iterator[None]:
        """While the block runs, the base behaves as if each update were added to its module's weight; None adds none.

        Raises:
            Refused: a module does not exist here or has another shape.
        """
        shapes, terms = {}, {}
        # Once through: an update may be read from the disk each time it is asked for.
        for module, update in (updates or {}).items():
            shapes[module], terms[module] = update.shape, self._term(update)
        self.check(shapes, who)
        with self.attach(terms):
            yield

    def _term(self, update: LowRank) -> Term:
        a, b = (factor.to(self.device, self.dtype) for factor in (update.A, update.B))

        def add(x: Tensor, y: Tensor) -> Tensor:
            hidden = x.reshape(-1, x.shape[-1]) @ a.T  # (tokens, r)
            return torch.addmm(y.reshape(-1, y.shape[-1]), hidden, b.T).view(y.shape)

        return add

    @contextmanager
    def new_adapter(
        self, *, rank: int, alpha: float, dropout: float, target_modules: str | Sequence[str], seed: int
    ) -> Iterator["NewAdapter"]:
        """While the block runs, the base carries a fresh trainable PEFT LoRA; afterwards it is as before.

        Raises:
            Refused: no module of the base bears one of the `target_modules` names.
        """
        from peft import LoraConfig, get_peft_model

        with _silence(), torch.random.fork_rng(devices=_cuda_devices(self.device)):
            torch.manual_seed(seed)
            config = LoraConfig(
                r=rank,
                lora_alpha=alpha,  # type: ignore[arg-type]
                lora_dropout=dropout,
                target_modules=target_modules if isinstance(target_modules, str) else sorted(target_modules),
                task_type="CAUSAL_LM",
            )
            try:
                adapted: Any = get_peft_model(self.model, config)
            except ValueError as error:
                raise Refused(
                    f"{self.name}: {error}", hint="name modules of this base with --target-modules"
                ) from error
        try:
            yield NewAdapter(adapted, self.name)
        finally:
            with _silence():
                adapted.unload()
            self.model.eval().requires_grad_(False)


class NewAdapter:
    """A LoRA in training; see `BaseModel.new_adapter`."""

    def __init__(self, adapted: Any, base: str) -> None:
        self._adapted = adapted
        self._base = base

    @property
    def parameters(self) -> list[Tensor]:
        """The trainable factors, in a fixed order."""
        return [parameter for _, parameter in self._adapted.named_parameters() if parameter.requires_grad]

    @contextmanager
    def dropout(self) -> Iterator[None]:
        """While the block runs, dropout is on."""
        self._adapted.train()
        try:
            yield
        finally:
            self._adapted.eval()

    def save(self, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT does; the card is left to the caller."""
        config = self._adapted.peft_config["default"]
        config.base_model_name_or_path, revision = split_revision(self._base)
        config.revision = revision or None
        # A set: its order would differ between two runs.
        config.target_modules = sorted(config.target_modules)
        with _silence():
            # Without False PEFT asks the Hub whether the base's vocabulary was changed.
            self._adapted.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRef:
    """A base model at one version, and how it is to be loaded: decided, while its weights still lie on the disk.

    `place` is a folder or a Hub id; `name` is what records and messages call it. `version` has 40 hex digits: the
    commit on the Hub; for a folder the head of a SHA-256 over the files that loading reads. `device` and `dtype` are
    those of this machine, never "auto".
    """

    place: str
    name: str
    version: str
    device: str
    dtype: str

    @property
    def settings(self) -> dict[str, str]:
        """Its part of a run's settings."""
        return {"base": self.name, "device": self.device, "dtype": self.dtype}

    @property
    def inputs(self) -> dict[str, str]:
        """Its part of a run's inputs."""
        return {f"base:{self.name}@{self.version}": self.version}

    def load(self) -> BaseModel:
        """Load it. Code that comes with a model is never run, pickles are never opened.

        Raises:
            AccessDenied, NetworkError: it cannot be had.
            Refused: it is not a causal language model this tool can load, or its weights are incomplete or broken.
        """
        options: dict[str, Any] = {"local_files_only": True}
        if folder_of(self.place) is None:
            # A copy on this machine is taken as it is: no request, and the same base tomorrow.
            options = {"local_files_only": cached_model(self.place, self.version) is not None, "revision": self.version}
        try:
            with _silence():
                tokenizer = _hf.AutoTokenizer.from_pretrained(self.place, trust_remote_code=False, **options)
                model, report = _hf.AutoModelForCausalLM.from_pretrained(
                    self.place,
                    trust_remote_code=False,
                    dtype=DTYPES[self.dtype],
                    use_safetensors=True,
                    output_loading_info=True,
                    adapter_kwargs=_NO_ADAPTER,
                    **options,
                )
        except Exception as error:
            _translate(self.place, error)
        missing = sorted(report["missing_keys"])
        if missing:
            raise Refused(
                f"{self.place}: {len(missing)} tensors are missing from its weights, {missing[0]} among them",
                hint="download the base model again",
            )
        return BaseModel(self.name, model.to(self.device), tokenizer, self.version)


def pin(name_or_path: str, *, name: str = "", device: str = "auto", dtype: str = "auto") -> BaseRef:
    """Decide on a base model without loading it. Hashing the weights of a folder takes a second per gigabyte or so.

    Args:
        name: what records and messages call it, where that is not `public_base(name_or_path)`.
        device, dtype: see `resolve`.

    Raises:
        NothingMatched, AccessDenied, NetworkError: there is none, or the Hub cannot be asked for its commit.
        UsageError, Refused: see `resolve`.
    """
    device, dtype = resolve(device, dtype)
    found = folder_or_hub(name_or_path)
    return BaseRef(
        place=str(found) if isinstance(found, Path) else found.repo,
        name=name or public_base(name_or_path),
        version=version_of_folder(found) if isinstance(found, Path) else _version_on_hub(found),
        device=device,
        dtype=dtype,
    )


def load(name_or_path: str, *, name: str = "", device: str = "auto", dtype: str = "auto") -> BaseModel:
    """`pin` and load at once."""
    return pin(name_or_path, name=name, device=device, dtype=dtype).load()


def resolve(device: str = "auto", dtype: str = "auto") -> tuple[str, str]:
    """The device and the precision that are meant on this machine.

    Args:
        device: cpu, cuda, cuda:N or mps; "auto" is cuda where there is one, else cpu.
        dtype: fp32, bf16 or fp16; "auto" is bf16 on cuda and fp32 elsewhere.

    Raises:
        UsageError: no such name. Refused: the device is not here.
    """
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of auto, {', '.join(DTYPES)}")
    device = resolve_device(device)
    if dtype == "auto":
        dtype = "bf16" if device.startswith("cuda") else "fp32"
    return device, dtype


def module_shapes(name_or_path: str) -> Mapping[str, tuple[int, int]] | None:
    """(out, in) of every module that can wear an update, from a model's configuration alone, without weights.

    The model is a folder, or on the Hub `owner/name` or `owner/name@revision`. None when the configuration is not on
    this machine (nothing is asked of the network) or is not that of a causal language model.
    """
    place, revision = split_revision(name_or_path) if folder_of(name_or_path) is None else (name_or_path, "")
    try:
        with _silence():
            config = _hf.AutoConfig.from_pretrained(
                place, revision=revision or MAIN, trust_remote_code=False, local_files_only=True
            )
            with torch.device("meta"):
                return _shapes(_hf.AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            shapes[name] = (outputs, inputs)
    return shapes


def _hook(term: Term) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda module, inputs, output: term(inputs[0], output)


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _times(shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}"


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


@contextmanager
def _silence() -> Iterator[None]:
    """What these libraries remark about themselves is no news to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _version_on_hub(model: HubModel) -> str:
    """The commit of the copy in the Hub client's cache where that is whole, else of the revision on the Hub."""
    if cached := cached_model(*model):
        return cached.name
    if not Hub().exists(model.repo):
        raise NothingMatched(f"no base model {model.repo}", hint="check the id; a private one wants 'hf auth login'")
    try:
        # By this the cache learns which commit a branch is; a later download by commit would not tell it.
        found = _hf.utils.cached_file(model.repo, "config.json", revision=model.revision)
    except Exception as error:
        _translate(str(model), error)
    return Path(found).parent.name


def _translate(name: str, error: Exception) -> NoReturn:
    """Raise what a failure of loading means to the user; a bug stays what it is."""
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
