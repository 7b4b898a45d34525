"""A loaded base model: its modules, updates applied to it, and its loss."""

import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import Refused
from lora_cli.formats.skeleton import Matrix, Skeleton
from lora_cli.models.apply import Factors, Term, Weight, applied, as_change, as_term, fixed
from lora_cli.models.encode import Encoded, encoder_of
from lora_cli.models.forms import Prompting
from lora_cli.models.four_bit import is_four_bit
from lora_cli.models.hf import hf
from lora_cli.models.new_adapter import NewAdapter, adapted, choose
from lora_cli.models.skeleton import skeleton_of
from lora_cli.precision import FOUR_BIT, dtype_name, remedy
from lora_cli.records import Example, Prompt

IGNORED = -100


class BaseModel:
    """A frozen causal language model with its tokenizer. Updates are applied without touching its weights.

    Args:
        name: the user's name for the model, in messages and records.
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        version: identifies the model, whatever its name; see `BaseRef`.
        prompting: the form of prompts.
        shapes: the skeleton of a quantised model, whose own weights have lost their shapes.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        version: str = "",
        prompting: Prompting | None = None,
        shapes: Skeleton | None = None,
    ) -> None:
        self.name, self.version, self._shapes = name, version, shapes
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.encoder = encoder_of(name, tokenizer, model.config, model.generation_config, prompting)
        self.ends = self.encoder.ends
        # Padding is masked, so any known token will do.
        fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad: int = next(token for token in fillers if token is not None and token < self.encoder.vocabulary)
        # Drop the model's own generation settings (sampling, penalties): output must be greedy.
        model.generation_config = hf.GenerationConfig(eos_token_id=self.ends, pad_token_id=self.pad)

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
        """Precision of the arithmetic, and of the weights but for those in 4 bits."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def dtype_name(self) -> str:
        """The precision of the weights as users spell it."""
        return FOUR_BIT if is_four_bit(self.model) else dtype_name(self.dtype)

    @property
    def arithmetic(self) -> str:
        """The precision of weights and arithmetic, in keys for results."""
        return f"{self.dtype} {FOUR_BIT}" if is_four_bit(self.model) else str(self.dtype)

    @cached_property
    def skeleton(self) -> Skeleton:
        """Every matrix that can take an update, by name."""
        return self._shapes or skeleton_of(self.model)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer, by name."""
        return self.skeleton.layers

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens of the generation prompt; see `Encoder.prompt_ids`."""
        return self.encoder.prompt_ids(prompt)

    def encode(self, example: Example) -> Encoded:
        """An example as this model reads it; see `Encoder.encode`."""
        return self.encoder.encode(example)

    def encode_all(self, examples: Sequence[Example]) -> list[Encoded]:
        """Examples as this model reads them; see `Encoder.encode`."""
        return self.encoder.encode_all(examples)

    def completion_losses(self, batch: Sequence[Encoded]) -> Tensor:
        """Negative log-likelihood in nats of each completion, summed over its tokens: (len(batch),) float32.

        Differentiable in the applied updates. Divide by `Encoded.tokens` for a mean per token.
        """
        logits, labels = self._predictions(batch)
        flat = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return flat.view(labels.shape).sum(dim=1)

    def completion_entropies(self, batch: Sequence[Encoded]) -> Tensor:
        """Entropy in nats of the distributions that predict each completion's tokens, summed: (len(batch),) float32.

        The tokens themselves do not count, except as context of later ones. Differentiable as `completion_losses`.
        """
        logits, labels = self._predictions(batch)
        logs = logits.float().log_softmax(dim=-1)
        return torch.where(labels == IGNORED, 0.0, -(logs.exp() * logs).sum(dim=-1)).sum(dim=1)

    def _predictions(self, batch: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Logits (batch, wanted, vocabulary) at the positions that predict a completion token, and these tokens."""
        tokens = self.filled(batch)
        labels = torch.full_like(tokens, IGNORED)
        for row, item in enumerate(batch):
            labels[row, item.start : len(item.ids)] = torch.tensor(item.ids[item.start :])
        wanted = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().flatten()
        labels = labels[:, 1:][:, wanted].to(self.device)
        # Nothing follows the last token.
        return self.logits(tokens[:, :-1].to(self.device), wanted.to(self.device), use_cache=False), labels

    def log_likelihoods(self, examples: Sequence[Example], *, batch_size: int = 16) -> list[float]:
        """`mean_log_likelihoods` of examples that are not encoded yet."""
        return self.mean_log_likelihoods(self.encode_all(examples), batch_size=batch_size)

    @torch.no_grad()
    def mean_log_likelihoods(self, encoded: Sequence[Encoded], *, batch_size: int = 16) -> list[float]:
        """Mean log-likelihood per token of each completion (all of `Encoded.tokens`), in nats.

        Raises:
            Refused: one that is not finite.
        """
        found = [0.0] * len(encoded)
        for rows in by_length([len(item.ids) for item in encoded], batch_size):
            losses = self.completion_losses([encoded[row] for row in rows]).tolist()
            for row, loss in zip(rows, losses, strict=True):
                if not math.isfinite(loss):
                    raise Refused(
                        f"the likelihood of example {encoded[row].id} is not finite in {self.dtype_name}",
                        hint=remedy(self.dtype_name, "leave this adapter out"),
                    )
                found[row] = -loss / encoded[row].tokens
        return found

    def filled(self, batch: Sequence[Encoded]) -> Tensor:
        """(len(batch), longest) token ids. A causal model never looks right, so this needs no attention mask."""
        tokens = torch.full((len(batch), max(len(item.ids) for item in batch)), self.pad)
        for row, item in enumerate(batch):
            tokens[row, : len(item.ids)] = torch.tensor(item.ids)
        return tokens

    def logits(self, tokens: Tensor, positions: Tensor, **options: Any) -> Tensor:
        """The logits at these positions of each row: (rows, positions, vocabulary). `options` are the model's own."""
        if self._keeps_logits:
            return self.model(input_ids=tokens, logits_to_keep=positions, **options).logits  # type: ignore[no-any-return]
        return self.model(input_ids=tokens, **options).logits[:, positions]  # type: ignore[no-any-return]

    @cached_property
    def _keeps_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

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
            f"{who} does not fit {self.name}: {problem}; modules that match: {covered} of {len(shapes)}",
            hint="use the adapter with the base model it was trained on",
        )

    @contextmanager
    def attach(
        self,
        factors: Mapping[str, Factors],
        terms: Mapping[str, Term] | None = None,
        *,
        weights: Mapping[str, Weight] | None = None,
        before: Callable[[], None] | None = None,
    ) -> Iterator[None]:
        """While the block runs, each named matrix has B·A added, with the factors of that moment.

        Args:
            factors: by matrix, a function that returns B and A in the model's precision, on its device.
            terms: by linear layer, a term for its output in place of one made of factors.
            weights: by linear layer, the weight for each call of it.
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
        with applied(self.model, made, changes, weights=weights, before=before):
            yield

    @contextmanager
    def applied(self, updates: Mapping[str, LowRank] | None, *, who: str = "the adapter") -> Iterator[None]:
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


def by_length(lengths: Sequence[int], batch_size: int, kinds: Sequence[Hashable] = ()) -> Iterator[list[int]]:
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
