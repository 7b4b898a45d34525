"""The memory of a pass through a model: the pass is made on tensors without data, and its bytes are counted."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_cli.models.base_model import BaseModel
from lora_cli.models.four_bit import quantise_without_data
from lora_cli.models.heap import KEPT
from lora_cli.models.hf import quiet
from lora_cli.models.loading import load_tokenizer
from lora_cli.models.skeleton import class_of, skeleton_of


def without_data(folder: Path, dtype: torch.dtype, *, named: str, four_bit: bool = False) -> BaseModel:
    """The base model in `folder` on the meta device: its shapes and its code, and no weights."""
    tokenizer, config, _ = load_tokenizer(folder, named=named)
    with quiet(), torch.device("meta"):
        model = class_of(config)(config).to(dtype)
        shapes = skeleton_of(model)
        if four_bit:
            quantise_without_data(model, shapes, dtype)
    return BaseModel(named, model, tokenizer, shapes=shapes)


class Most(NamedTuple):
    """The most bytes that tensors hold at once: all of them, and those whose memory the C library may keep."""

    all: int
    small: int


def most_held(work: Callable[[], object]) -> Most:
    """The most bytes that tensors on the meta device hold at once during `work`, beside those that were there before.

    Attention is that of the fused kernels, which keep no scores. A question about a tensor's data is answered by yes:
    transformers asks whether a batch is ordinary.

    Raises any exception for work that depends on data in other ways.
    """
    with _fused_attention(), _Counting() as counting:
        work()
    return Most(counting.all.most, counting.small.most)


class _Sum:
    """A number of bytes, and the most that it has been."""

    def __init__(self) -> None:
        self._now = self.most = 0

    def add(self, size: int) -> None:
        self._now += size
        self.most = max(self.most, self._now)


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages from the moment an operation returns them until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held: set[int] = set()
        self.all, self.small = _Sum(), _Sum()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True
        given = {storage._cdata for storage in _storages((args, kwargs))}
        found = function(*args, **(kwargs or {}))
        for storage in _storages(found):
            # A view of what was there before, such as a transposed weight, holds nothing of its own.
            if storage._cdata not in given | self._held:
                self._held.add(storage._cdata)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return found

    def _free(self, key: int, size: int) -> None:
        self._held.discard(key)
        self._add(-size)

    def _add(self, size: int) -> None:
        self.all.add(size)
        if abs(size) < KEPT:
            self.small.add(size)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """The storages of all tensors in a tree that are on the meta device."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta]


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention by a fused kernel: the meta device would take the one that keeps every score."""

    def fused(q: Tensor, k: Tensor, v: Tensor, *_: Any, **named: Any) -> Tensor:
        mask, causal = named.get("attn_mask"), named.get("is_causal", False)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
        return found[0]  # type: ignore[no-any-return]

    functional: Any = torch.nn.functional
    usual = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual
