"""Apply updates in a running model, without touching its weights.

An update of a linear layer or an embedding is added to the layer's output. Every other one (a convolution, a router,
fused experts) is added to the weight for the time of its module's own forward pass.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.algebra.lowrank import LowRank
from lora_cli.formats.skeleton import Matrix

Term = Callable[[Tensor, Tensor], Tensor]
"""Called as term(input, output) of a module, (…, in) and (…, out); returns the module's new output."""

Change = Callable[[], Tensor]
"""Returns the tensor to add to a parameter, in its shape."""

Weight = Callable[[Tensor], Tensor | None]
"""Called with the input of a linear layer; returns the weight for this call of it, None for its own."""

Factors = Callable[[], tuple[Tensor, Tensor]]
"""Returns B (out, r) and A (r, in) of one matrix."""


@contextmanager
def applied(
    model: nn.Module,
    terms: Mapping[str, Term],
    changes: Mapping[str, Change],
    *,
    weights: Mapping[str, Weight] | None = None,
    before: Callable[[], None] | None = None,
) -> Iterator[None]:
    """While the block runs, each named module's output goes through its term and each named parameter is changed.

    Of a linear layer that `weights` names, a call takes the weight that is made for it, or else goes through its term.
    `before` runs before each pass of the model.
    """
    with ExitStack() as stack:
        for name, term in terms.items():
            module, weight = model.get_submodule(name), (weights or {}).get(name)
            if weight is None:
                stack.callback(module.register_forward_hook(_through(term)).remove)
                continue
            for hook in _either(module, weight, term):
                stack.callback(hook.remove)
        for name, change in changes.items():
            owner, _, last = name.rpartition(".")
            for hook in _swap(model.get_submodule(owner), last, change):
                stack.callback(hook.remove)
        if before is not None:
            stack.callback(model.register_forward_pre_hook(lambda module, arguments: before()).remove)
        yield


def _through(term: Term) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda module, inputs, output: term(inputs[0], output)


def _either(module: nn.Module, weight: Weight, term: Term) -> list[Any]:
    """Hooks by which a call of a linear layer takes the weight made for it, or its output goes through the term."""
    # Private, as in _swap.
    parameters, own = module._parameters, module._parameters["weight"]

    def begin(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        other = weight(inputs[0])
        if other is not None:
            parameters["weight"] = other  # type: ignore[assignment]

    def end(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None) -> Tensor | None:
        if parameters["weight"] is own:
            return None if output is None else term(inputs[0], output)  # None after an error
        parameters["weight"] = own
        return None

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]


def _swap(module: nn.Module, last: str, change: Change) -> list[Any]:
    """Hooks that replace a parameter by another tensor while the module runs."""
    # Private: torch has no public way to put a plain tensor into a parameter's place and keep the parameters' order.
    own = module._parameters[last]
    assert own is not None

    def begin(module: nn.Module, arguments: Any) -> None:
        module._parameters[last] = own + change()  # type: ignore[assignment]

    def end(module: nn.Module, arguments: Any, output: Any) -> None:
        module._parameters[last] = own

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]


def fixed(update: LowRank) -> Factors:
    """The factors of a fixed update."""
    return lambda: (update.B, update.A)


def as_term(module: nn.Module, matrix: Matrix, factors: Factors) -> Term:
    """The output of a linear layer or an embedding with its update added."""
    if matrix.kind == "embedding":
        size = getattr(module, "embed_scale", 1.0)

        def look_up(x: Tensor, y: Tensor) -> Tensor:
            b, a = factors()
            return y + nn.functional.embedding(x, a.T) @ b.T * size

        return look_up

    def add(x: Tensor, y: Tensor) -> Tensor:
        b, a = factors()
        hidden = x.reshape(-1, x.shape[-1]) @ a.T  # (tokens, r)
        return torch.addmm(y.reshape(-1, y.shape[-1]), hidden, b.T).view(y.shape)

    return add


def as_change(parameter: Tensor, matrices: Mapping[str, Matrix], factors: Mapping[str, Factors]) -> Change:
    """The sum that updates of some matrices of one parameter add to it."""

    def total() -> Tensor:
        delta = parameter.new_zeros(parameter.shape)
        for name, matrix in matrices.items():
            b, a = factors[name]()
            update = a.T @ b.T if matrix.transposed else b @ a
            if matrix.expert is None:
                delta = delta + update.view(parameter.shape)
            else:
                delta[matrix.expert, matrix.row : matrix.row + len(update)] += update
        return delta

    return total
