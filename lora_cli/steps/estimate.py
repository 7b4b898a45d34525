"""What a job will need: bytes to read and write, memory, and a time from counted work and the speed of this machine.

Nothing is downloaded, loaded or written: sizes come from headers, and for adapters that are not here from the
catalogue. Seconds are counted operations at a measured rate, so they are right within a small factor at best.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

from lora_cli.formats.checkpoint import BLOCK, Checkpoint, cached_model, open_checkpoint
from lora_cli.formats.delta import OpenDelta
from lora_cli.formats.reader import OpenAdapter
from lora_cli.formats.run_record import peak_bytes
from lora_cli.formats.store import locate
from lora_cli.merge_options import MergeOptions
from lora_cli.models.encode import Encoded
from lora_cli.models.four_bit import packed, quantised
from lora_cli.models.heap import keeps_freed_memory
from lora_cli.models.ref import BaseRef, load_encoder
from lora_cli.names import leaf
from lora_cli.precision import BITS, torch_dtype
from lora_cli.recipes import Recipe, TargetRecipe, TrainOptions
from lora_cli.records import ALL_LINEAR, Adapter, Example
from lora_cli.settings import folder_of
from lora_cli.steps.bases import skeleton_at
from lora_cli.steps.fit.fit import NOISES
from lora_cli.steps.fit.request import FitRequest
from lora_cli.steps.memory import held_by_fit
from lora_cli.steps.merge.inputs import ModuleInputs
from lora_cli.steps.merge.module import held_dense, modules_at_once
from lora_cli.steps.merge.plan import MergePlan, rank_choice
from lora_cli.steps.opened_pool import Pool
from lora_cli.steps.pool.gather import files_of, opened
from lora_cli.steps.speed import rates_of
from lora_cli.steps.train.descent import TOKENS_PER_PASS
from lora_cli.steps.train.request import TrainJob
from lora_cli.task import load_task

FP32 = 4
# The work of a weighted sum by QR and SVD, in multiplications per (out + in) R² and per R³; R is the sum of the ranks.
_QR, _SVD = 3, 15
# The time of other methods as a multiple of the weighted sum's: docs/benchmarks.md, 50 adapters of rank 16.
_TIMES_LINEAR = {"norm-matched": 1.7, "wudi": 2.3, "tsv": 2.2, "knots": 3.4, "core": 3.0, "lego": 0.4, "cat": 0.05}
_OTHERS = 2.5
# Work on a dense update in multiplications per entry: of each adapter, and once for the reduction of the result's rank.
_PER_ENTRY, _PER_RESULT = 50, 400
# Numbers in work per number of a module's factors or of its dense update.
_FACTORS_IN_WORK, _DENSE_IN_WORK = 6, 2.5
# Multiplications per entry of a base's tensor that a bake casts, adds to and measures.
_PER_BAKED = 180
# Values that training keeps per input and output of a linear layer and token, and those of a LoRA on top.
_KEPT, _KEPT_BY_LORA = 1.5, 2.0
# Copies of the logits, and small operations of a linear layer's surroundings in a forward and a backward pass.
_LOGITS, CALLS = 4, 60
_SAMPLE = 256
FIRST_PASS = 20e6
"""Memory of a first pass through torch, in bytes: its threads' buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a job needs: bytes to read, bytes to write, the peak of its memory in bytes, and seconds.

    `parts` are the bytes of that memory by what holds them, where that is known.
    """

    read_bytes: int
    written_bytes: int
    memory_bytes: int
    seconds: float
    parts: Mapping[str, int] = field(default_factory=dict)


class Stack(NamedTuple):
    """One module (out, in), and the ranks of the adapters that have it."""

    out: float
    into: float
    ranks: tuple[int, ...]

    @property
    def numbers(self) -> float:
        """The numbers in all factors."""
        return (self.out + self.into) * sum(self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The size of an adapter: its bytes, those of one number, and (out, in, rank) of each module."""

    bytes: int
    width: float
    modules: Mapping[str, tuple[float, float, float]]

    @classmethod
    def of_open(cls, adapter: OpenAdapter | OpenDelta) -> "Outline":
        """The outline of an adapter on this machine; a whole update counts as factors of its own size."""
        shapes = {name: adapter.shape(name) for name in adapter.modules}
        if isinstance(adapter, OpenDelta):
            size = adapter.file.stat().st_size
            ranks = {name: out * into / (out + into) for name, (out, into) in shapes.items()}
            return cls(bytes=size, width=FP32, modules={name: (*shapes[name], rank) for name, rank in ranks.items()})
        return cls(
            bytes=adapter.files.weights.stat().st_size,
            width=max(BITS[dtype] // 8 for dtype in adapter.dtypes),
            modules={name: (*shape, adapter.modules[name].rank) for name, shape in shapes.items()},
        )

    @classmethod
    def of_row(cls, row: Adapter) -> "Outline":
        """The outline of an adapter that only the catalogue has; every module counts as square, and of one size."""
        side = row.parameters / max(1, sum(row.ranks.values())) / 2
        modules = {name: (side, side, rank) for name, rank in row.ranks.items()}
        return cls(bytes=row.bytes, width=row.bytes / max(1, row.parameters), modules=modules)


def outlines(pool: Pool, names: Sequence[str]) -> list[Outline]:
    """The outlines of adapters, from the headers of those on this machine, else from the catalogue."""
    found = []
    for ref, row in pool.found(names):
        if row is not None and locate(ref) is None:
            found.append(Outline.of_row(row))
        else:
            found.append(Outline.of_open(opened(files_of(ref), None, whole=True)))
    return found


def of_merge(outlines: Sequence[Outline], options: MergeOptions, modules: Sequence[str] | None = None) -> Estimate:
    """A merge of these adapters, of `modules` only where some are named."""
    stacks = _stacks(outlines, modules)
    ranks = [_result_rank(stack, options) for stack in stacks]
    if not options.compact:
        ranks = [max(ranks)] * len(ranks)
    width = _width(options.dtype) or (
        outlines[0].width if len({round(one.width, 1) for one in outlines}) == 1 else FP32
    )
    numbers = [
        stack.out * stack.into if options.dense else (stack.out + stack.into) * rank
        for stack, rank in zip(stacks, ranks, strict=True)
    ]
    written = math.ceil(sum(numbers) * width)
    read = sum(one.bytes for one in outlines)
    workers = modules_at_once(options, math.ceil(max(stack.numbers for stack in stacks)))
    rates = rates_of(options.device, "fp32", 1)
    products = sum(_products(stack, options) for stack in stacks)
    return Estimate(
        read_bytes=read,
        written_bytes=written,
        memory_bytes=math.ceil(
            peak_bytes() + FIRST_PASS + workers * FP32 * max(_in_work(one, options) for one in stacks)
        ),
        seconds=(read + written) / rates.hashed + products / (rates.products * workers),
    )


def of_plan(plan: MergePlan) -> Estimate:
    """A planned merge, with the passes through the base that record activations, if its method needs them."""
    found = of_merge([Outline.of_open(adapter) for adapter in plan.adapters], plan.options, plan.modules)
    if not isinstance(plan.inputs, ModuleInputs) or (model := model_of(plan.inputs.base)) is None:
        return found
    ref, files = plan.inputs.base, plan.inputs.files
    rates = rates_of(ref.device, ref.compute, torch.get_num_threads())
    tasks = [load_task(file) for file in files.values()]
    tokens = sum(len(task) * lengths_of(encoded(ref, task)).tokens for task in tasks)
    return replace(
        found,
        read_bytes=found.read_bytes + model.bytes,
        memory_bytes=found.memory_bytes + model.bytes,
        seconds=found.seconds + model.bytes / rates.hashed + tokens * model.products / rates.products,
    )


def _stacks(outlines: Sequence[Outline], modules: Sequence[str] | None = None) -> list[Stack]:
    names = dict.fromkeys(name for one in outlines for name in one.modules) if modules is None else modules
    found = []
    for name in names:
        having = [one.modules[name] for one in outlines if name in one.modules]
        found.append(Stack(having[0][0], having[0][1], tuple(round(rank) for _, _, rank in having)))
    return found


def _result_rank(stack: Stack, options: MergeOptions) -> int:
    """The rank of a module's result, at most: with --energy it is known only afterwards."""
    most = rank_choice(options.rank, options.energy, stack.ranks).ceiling or sum(stack.ranks)
    possible = min(stack.out, stack.into) if held_dense(options) else min(sum(stack.ranks), stack.out, stack.into)
    return math.ceil(min(most, possible))


def _width(precision: str) -> int:
    return 0 if precision == "auto" else torch_dtype(precision).itemsize


def _in_work(stack: Stack, options: MergeOptions) -> float:
    """The numbers held while a module is merged."""
    dense = _DENSE_IN_WORK * stack.out * stack.into if held_dense(options) else 0
    return dense + _FACTORS_IN_WORK * stack.numbers


def _products(stack: Stack, options: MergeOptions) -> float:
    """The multiplications that merge a module."""
    total, entries = sum(stack.ranks), stack.out * stack.into
    if held_dense(options):
        reduced = 0 if options.dense else _PER_RESULT
        return entries * (sum(2 * rank + _PER_ENTRY for rank in stack.ranks) + reduced)
    small = min(total, stack.out, stack.into)
    return _TIMES_LINEAR.get(options.method, _OTHERS if options.method != "linear" else 1) * (
        _QR * (stack.out + stack.into) * total * small + _SVD * small**3
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A base model: its numbers, bytes of one in the arithmetic and of all in memory, shapes of its linear layers."""

    numbers: int
    width: int
    bytes: int
    layers: Mapping[str, tuple[int, int]]
    vocabulary: int

    @property
    def products(self) -> int:
        """The multiplications of a forward pass per token."""
        return sum(out * into for out, into in self.layers.values()) or self.numbers


def model_of(ref: BaseRef) -> Model | None:
    """The base model, None if it is not on this machine."""
    if (place := place_of(ref)) is None:
        return None
    checkpoint, skeleton = open_checkpoint(place, ref.name), skeleton_at(place)
    layers = {} if skeleton is None else skeleton.layers
    numbers, width = _numbers(checkpoint), torch_dtype(ref.compute).itemsize
    small = [math.prod(layers[name]) for name in quantised(skeleton)] if ref.four_bit and skeleton is not None else []
    return Model(
        numbers=numbers,
        width=width,
        bytes=(numbers - sum(small)) * width + sum(map(packed, small)),
        layers=layers,
        vocabulary=layers[skeleton.head][0] if skeleton is not None and skeleton.head in layers else 0,
    )


def place_of(ref: BaseRef) -> Path | None:
    """The folder of the base model's files, None if they are not on this machine."""
    return folder_of(ref.place) or cached_model(ref.place, ref.version)


def _numbers(checkpoint: Checkpoint) -> int:
    return sum(math.prod(entry.shape) for header in checkpoint.headers.values() for entry in header.tensors.values())


class Lengths(NamedTuple):
    """A task's examples in tokens: the mean and the longest, those learnt at most, and the examples for validation."""

    tokens: float
    longest: int
    learnt: float
    held: int = 0


def encoded(ref: BaseRef, examples: Sequence[Example], *, labelled: bool = True) -> list[Encoded]:
    """The first examples of a task, or their prompts, as the base reads them."""
    encoder = load_encoder(ref.place, prompting=ref.prompting)
    return (encoder.encode_all if labelled else encoder.prompts_of)(examples[:_SAMPLE])


def lengths_of(found: Sequence[Encoded], held: int = 0) -> Lengths:
    """Lengths by the first examples of a task, of which so many are for validation."""
    lengths = [len(one.ids) for one in found]
    return Lengths(mean(lengths), max(lengths), max(one.tokens for one in found), held)


def of_train(job: TrainJob) -> Estimate | None:
    """The training of a new LoRA; None if the base is not on this machine."""
    model = model_of(job.ref)
    if model is None:
        return None
    lengths = lengths_of(encoded(job.ref, job.task.examples), job.task.validated)
    return _of_new(job.ref, model, lengths, job.options, job.recipe)


def _of_new(ref: BaseRef, model: Model, lengths: Lengths, options: TrainOptions, recipe: Recipe) -> Estimate:
    adapted = [*adapted_by(options, model).values()]
    numbers = options.rank * sum(map(sum, adapted))
    lora = sum(map(sum, adapted)) * FP32
    found = _of_learning(ref, model, lengths, recipe, beside=numbers, kept=_KEPT_BY_LORA * lora)
    # Weights, gradients, two moments and the best values are held.
    return replace(found, written_bytes=numbers * FP32, memory_bytes=found.memory_bytes + 5 * numbers * FP32)


def adapted_by(options: TrainOptions, model: Model) -> dict[str, tuple[int, int]]:
    """The shapes of the layers that a new LoRA adapts."""
    targets, head = options.shape["target_modules"], model.vocabulary
    layers = model.layers.items()
    return {name: at for name, at in layers if (targets == ALL_LINEAR and at[0] != head) or leaf(name) in targets}


def of_fit(request: FitRequest, ref: BaseRef) -> Estimate | None:
    """A fit: the learning with its controls, then a merge beside the base; None if the base is not on this machine."""
    model = model_of(ref)
    if model is None:
        return None
    options, known = request.options, outlines(request.pool, request.names)
    recipe, copies = request.work(len(known))
    found = encoded(ref, request.task.examples, labelled=request.shape.labelled)
    lengths, numbers = lengths_of(found, request.task.validated), sum(stack.numbers for stack in _stacks(known))
    learning = _of_learning(ref, model, lengths, recipe, beside=numbers)
    merge = of_merge(known, request.merging)
    fits = options.seeds * (1 + sum(name in NOISES for name in options.controls))
    seconds = fits * learning.seconds + merge.seconds
    parts = _parts(ref, known, found, recipe.batch, options.grad_checkpointing)
    held: float = sum(parts.values()) or learning.memory_bytes + numbers * model.width
    held += numbers * copies * FP32
    if "target" in options.controls:
        long = _of_new(ref, model, lengths, TrainOptions(), TargetRecipe())
        seconds, held = seconds + options.seeds * long.seconds, max(held, long.memory_bytes)
    return Estimate(
        read_bytes=learning.read_bytes + merge.read_bytes,
        written_bytes=merge.written_bytes,
        memory_bytes=math.ceil(max(held, merge.memory_bytes + model.bytes)),
        seconds=seconds,
        parts=parts,
    )


def _parts(
    ref: BaseRef, known: Sequence[Outline], examples: Sequence[Encoded], batch: int, recompute: bool
) -> dict[str, int]:
    """The memory of a fit by what holds it, {} where its pass cannot be counted."""
    place, ranks = place_of(ref), Counter[str]()
    for one in known:
        ranks.update({name: round(rank) for name, (_, _, rank) in one.modules.items()})
    if place is None:
        return {}
    compute, heap = torch_dtype(ref.compute), keeps_freed_memory(ref.device)
    held = held_by_fit(
        place, compute, ranks, examples, batch=batch, recompute=recompute, four_bit=ref.four_bit, heap=heap
    )
    if held is None:
        return {}
    return {**held, "program": math.ceil(peak_bytes() + FIRST_PASS) if ref.device == "cpu" else 0}


def _of_learning(
    ref: BaseRef, model: Model, lengths: Lengths, recipe: Recipe, *, beside: float, kept: float = 0
) -> Estimate:
    """A training through a frozen base, and `beside` numbers of adapters; `kept` bytes are kept per token for these."""
    rates = rates_of(ref.device, ref.compute, torch.get_num_threads())
    evaluations = math.ceil(recipe.steps / recipe.every) + 2
    learnt = recipe.steps * recipe.batch * lengths.tokens
    judged = evaluations * lengths.held * lengths.tokens
    # Forward, and backward to the input; of the adapters' factors to their own values as well.
    products = learnt * (2 * model.products + 3 * beside) + judged * (model.products + beside)
    passes: float = recipe.steps * math.ceil(recipe.batch * lengths.longest / TOKENS_PER_PASS)
    passes += evaluations * math.ceil(lengths.held * lengths.longest / TOKENS_PER_PASS) / 3
    rows = min(recipe.batch, max(1, TOKENS_PER_PASS // lengths.longest))
    width = sum(map(sum, model.layers.values()))
    in_pass = rows * lengths.longest * (_KEPT * width * model.width + kept)
    logits = (
        _LOGITS
        * FP32
        * model.vocabulary
        * max(rows * lengths.learnt, min(lengths.held, TOKENS_PER_PASS // lengths.longest) * lengths.learnt / 2)
    )
    return Estimate(
        read_bytes=model.bytes,
        written_bytes=0,
        memory_bytes=math.ceil(peak_bytes() + FIRST_PASS + model.bytes + in_pass + logits),
        seconds=model.bytes / rates.hashed
        + products / rates.products
        + passes * len(model.layers) * CALLS * rates.call,
    )


def of_bake(checkpoint: Checkpoint, outline: Outline, dtype: str) -> Estimate:
    """A bake: a stream over the base's files."""
    read = sum((checkpoint.folder / part).stat().st_size for part in checkpoint.headers)
    written = read if dtype == "auto" else _numbers(checkpoint) * _width(dtype)
    largest = max((out + into) * rank for out, into, rank in outline.modules.values())
    entries = sum(out * into for out, into, _ in outline.modules.values())
    rates, workers = rates_of("cpu", "fp32", 1), torch.get_num_threads()
    blocks = 3 * (workers + 1) * BLOCK
    return Estimate(
        read_bytes=read + outline.bytes,
        written_bytes=written,
        memory_bytes=math.ceil(peak_bytes() + FIRST_PASS + FP32 * (4 * largest + blocks)),
        seconds=(read + written) / rates.hashed + entries * _PER_BAKED / (rates.products * workers),
    )
