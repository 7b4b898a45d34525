"""The matrices of a base model's own class that can take an update, by name, without weights.

Names are those of the transformers class that the base's configuration names. A matrix is a module's weight, or one
expert of a stacked parameter: `layers.0.mlp.experts.3.gate_up_proj` is the fourth matrix of
`layers.0.mlp.experts.gate_up_proj`, and `layers.0.mlp.experts.3.up_proj` the rows of it that older versions of
transformers kept as a module of that name.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal, NamedTuple

Kind = Literal["linear", "embedding", "conv", "parameter"]
"""How PEFT adapts a matrix: by a layer around its module, or (`parameter`) on the weight itself."""

WEIGHT: Final = ".weight"

Renaming = Callable[[Collection[str], str], Mapping[str, str]]
Storage = Callable[[Mapping[str, tuple[int, ...]]], "Stored"]


class Matrix(NamedTuple):
    """One matrix of shape (out, in) as it acts: an embedding maps the vocabulary to its features.

    `parameter` is the tensor of the class that holds it, of shape `stored`. `transposed`: stored (in, out). Of a stack
    it is the matrix `expert`, and of that, where it is a part of a fused matrix, the rows from `row` on.
    """

    kind: Kind
    shape: tuple[int, int]
    parameter: str
    stored: tuple[int, ...]
    transposed: bool = False
    expert: int | None = None
    row: int = 0


class Spelling(NamedTuple):
    """How another class of one base names its modules: with `added` in front of this class's names, or without `cut`.

    The model without a head and those with one differ so.
    """

    added: str = ""
    cut: str = ""

    def of(self, name: str) -> str:
        """The name of a module in that class."""
        return self.added + name.removeprefix(self.cut)


OWN: Final = Spelling()
"""The names of the base's own class."""


class Share(NamedTuple):
    """Where a checkpoint keeps a parameter or a part of it: in `tensor`, from its row `at` on.

    There stand `rows` rows of the parameter from `row` on, of one `expert` where the parameter is a stack and this is
    not all of it; all rows of all experts where `rows` is 0, the columns as rows where it is `turned`.
    """

    tensor: str
    expert: int | None = None
    row: int = 0
    rows: int = 0
    at: int = 0
    turned: bool = False


class Stored(NamedTuple):
    """By parameter its shares in a checkpoint, and the arrangement of those that are kept in no such shares."""

    shares: dict[str, list[Share]]
    others: dict[str, str]


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter that holds one matrix (out, in) per expert.

    `parts` are the names that checkpoints of transformers 4 give to equal shares of the rows, in order; () where
    there are none.
    """

    experts: int
    shape: tuple[int, int]
    transposed: bool = False
    parts: tuple[str, ...] = ()

    @property
    def stored(self) -> tuple[int, int, int]:
        """Shape of the parameter."""
        out_features, in_features = self.shape
        return (self.experts, in_features, out_features) if self.transposed else (self.experts, *self.shape)


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The class `architecture` as one configuration builds it.

    `matrices` are by module name (a parameter other than a `weight` by its own name), `stacks` by parameter name.
    `others` are the last names of modules that take no update, `attentions` names of PyTorch's own attention modules.
    `numbers` are all numbers of the class's parameters and buffers.
    `prefix` is the part of names below which the model without a head stands, `decoder` the module that holds the text
    model's layers, `head` that of the output embeddings. `ties` are by module the others that share its weight.
    `renamed(names, ending)` gives the module names of this class for those of a checkpoint whose tensors end with
    `ending`, by transformers' own tables; `peft_renames`: PEFT applies these tables to adapters too. `retargeted` are
    last names of target modules that PEFT takes for parts of the experts, wherever they stand. `stored(shapes)` says
    where a checkpoint with tensors of these shapes keeps each parameter.
    """

    architecture: str
    matrices: Mapping[str, Matrix] = field(repr=False)
    stacks: Mapping[str, Stack] = field(repr=False)
    numbers: int = 0
    others: frozenset[str] = field(default=frozenset(), repr=False)
    attentions: frozenset[str] = field(default=frozenset(), repr=False)
    prefix: str = ""
    decoder: str = ""
    head: str = ""
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    peft_renames: bool = False
    retargeted: frozenset[str] = frozenset()
    renamed: Renaming = field(default=lambda names, ending: {}, repr=False, compare=False)
    stored: Storage = field(default=lambda tensors: Stored({}, {}), repr=False, compare=False)

    def get(self, name: str) -> Matrix | None:
        """The matrix of a module, of an expert (`…experts.3.gate_up_proj`) or of a part of one; None for no such."""
        return self.matrices.get(name) or self._expert(name)

    @cached_property
    def layers(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer, by name."""
        return {name: matrix.shape for name, matrix in self.matrices.items() if matrix.kind == "linear"}

    def experts(self, names: Iterable[str]) -> dict[str, Matrix]:
        """Those of the modules `names` that are matrices of experts, or parts of them."""
        found = {name: self.get(name) for name in names}
        return {name: matrix for name, matrix in found.items() if matrix is not None and matrix.expert is not None}

    def in_attention(self, name: str) -> bool:
        """Whether a name belongs to one of `attentions` or to a part of one."""
        return any(f"{name}.".startswith(f"{one}.") for one in self.attentions)

    def _expert(self, name: str) -> Matrix | None:
        rest, _, last = name.rpartition(".")
        container, _, number = rest.rpartition(".")
        if not (number.isascii() and number.isdecimal() and len(number) < 6):
            return None
        for owned, stack in self.below.get(container, {}).items():
            if (last != owned and last not in stack.parts) or int(number) >= stack.experts:
                continue
            place = stack.parts.index(last) if last != owned else 0
            height = stack.shape[0] // len(stack.parts) if last != owned else stack.shape[0]
            return Matrix(
                "parameter",
                (height, stack.shape[1]),
                f"{container}.{owned}",
                stack.stored,
                stack.transposed,
                int(number),
                place * height,
            )
        return None

    @cached_property
    def below(self) -> Mapping[str, Mapping[str, Stack]]:
        """Module → last name of a stacked parameter of it → the stack, in the order in which they are registered."""
        found: dict[str, dict[str, Stack]] = {}
        for name, stack in self.stacks.items():
            container, _, last = name.rpartition(".")
            found.setdefault(container, {})[last] = stack
        return found
