"""Keys and values of the rows of a batch: begun from a shared text, gathered from several passes, written in place.

transformers' own cache is copied at each token. Here rows have spare columns behind them, into which tokens are
written. Gathered rows end in one column, as generation goes on at the right.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import cache_utils

from lora_cli.models.base_model import BaseModel

_caches: Any = cache_utils


class Place(NamedTuple):
    """A row's keys and values: in a cache, by number, the `length` columns before `end` of its row `row`."""

    cache: int
    row: int
    end: int
    length: int


class _Layer(_caches.DynamicLayer):  # type: ignore[misc]
    """One layer, whose `keys` and `values` are the first columns of the larger tensors `whole`."""

    def __init__(self, whole: tuple[Tensor, Tensor], columns: int) -> None:
        super().__init__()
        self.lazy_initialization(*whole)
        self.whole = whole
        self._show(columns)

    def _show(self, columns: int) -> None:
        self.keys, self.values = (one[:, :, :columns] for one in self.whole)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin: int = self.keys.shape[2]
        end = begin + key_states.shape[2]
        for one, new in zip(self.whole, (key_states, value_states), strict=True):
            one[:, :, begin:end] = new
        self._show(end)
        return self.keys, self.values


def can_keep(base: BaseModel) -> bool:
    """Whether all that a base keeps of a text is keys and values by token, so that rows can be gathered and go on.

    A model with a recurrent state cannot, nor one that cuts texts into chunks by their columns.
    """
    config = base.model.config.get_text_config(decoder=True)
    kinds = {type(layer) for layer in _caches.DynamicCache(config=config).layers}
    chunks = getattr(config, "attention_chunk_size", None) is not None
    takes_positions = "position_ids" in inspect.signature(base.model.forward).parameters
    return kinds <= {_caches.DynamicLayer, _caches.DynamicSlidingWindowLayer} and takes_positions and not chunks


def as_argument(base: BaseModel, cache: Any) -> dict[str, Any]:
    """A cache as arguments of the model, whose name for it depends on the version of transformers."""
    names = inspect.signature(base.model.forward).parameters
    return {"use_cache": True, "cache" if "cache" in names else "past_key_values": cache}


def empty() -> Any:
    """A cache of nothing. It keeps whole texts, of models with a sliding window too."""
    return _caches.DynamicCache()


def begun(shared: Any, rows: Sequence[int], columns: int) -> Any:
    """A cache that begins with these rows of `shared` and takes `columns` more."""
    chosen, layers = torch.tensor(rows), []
    for layer in shared.layers:
        if not layer.is_initialized:  # it uses the keys and values of another layer
            layers.append(_caches.DynamicLayer())
            continue
        known = layer.keys.shape[2]
        whole = []
        for part in (layer.keys, layer.values):
            _, heads, _, size = part.shape
            one = part.new_empty(len(rows), heads, known + columns, size)
            one[:, :, :known] = part[chosen.to(part.device)]
            whole.append(one)
        layers.append(_Layer((whole[0], whole[1]), known))
    return _caches.Cache(layers=layers)


def gathered(caches: Sequence[Any], places: Sequence[Place], spare: int) -> tuple[Any, Tensor]:
    """One cache of these rows with `spare` columns behind, and its mask (rows, columns + spare): 0 before a row."""
    width = max(place.length for place in places)
    layers = []
    index, known = torch.empty(0), None
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        if not parts[0].is_initialized:
            layers.append(_caches.DynamicLayer())
            continue
        wholes = [part.whole if isinstance(part, _Layer) else (part.keys, part.values) for part in parts]
        shapes = [keys.shape for keys, _ in wholes]
        if shapes != known:
            index, known = _index(shapes, places, width, spare).to(wholes[0][0].device), shapes
        keys, values = (_taken(every, index) for every in zip(*wholes, strict=True))
        layers.append(_Layer((keys, values), width))
    lengths = torch.tensor([place.length for place in places])
    mask = torch.arange(width + spare) >= width - lengths[:, None]
    return _caches.Cache(layers=layers), mask.to(index.device)


def _index(shapes: Sequence[Sequence[int]], places: Sequence[Place], width: int, spare: int) -> Tensor:
    """(rows, heads, width + spare): the vectors of the new tensor among those of all old ones, one after the other."""
    firsts, heads = [0], shapes[0][1]
    for shape in shapes:
        firsts.append(firsts[-1] + shape[0] * heads * shape[2])
    caches, rows, ends, _ = torch.tensor(places).T
    columns = torch.tensor([shape[2] for shape in shapes])[caches]
    first = torch.tensor(firsts)[caches] + rows * heads * columns
    inside = (ends[:, None] - width + torch.arange(width + spare)).clamp(min=0).minimum(columns[:, None] - 1)
    index: Tensor = first[:, None, None] + torch.arange(heads)[:, None] * columns[:, None, None] + inside[:, None]
    return index


def _taken(tensors: Sequence[Tensor], index: Tensor) -> Tensor:
    size = tensors[0].shape[-1]
    flat = [one.reshape(-1, size) for one in tensors]
    vectors: Tensor = flat[0] if len(flat) == 1 else torch.cat(flat)
    return vectors.index_select(0, index.flatten()).view(*index.shape, size)
