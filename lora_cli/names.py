"""What a name means: of a module, an adapter, a repository of the Hub."""

from typing import NamedTuple


class Layer(NamedTuple):
    """A module's place in a stack of layers: `mlp.up_proj` in layer `3` of `model.layers`.

    `stack` and `place` are "" where the name begins or ends with the layer's number.
    """

    stack: str
    number: str
    place: str

    @property
    def name(self) -> str:
        """The layer's own name: `model.layers.3`."""
        return f"{self.stack}.{self.number}" if self.stack else self.number


def layer_of(module: str) -> Layer | None:
    """The layer that holds a module: the first number in its name. None for a name without numbers."""
    parts = module.split(".")
    for at, part in enumerate(parts):
        if part.isascii() and part.isdecimal():
            return Layer(".".join(parts[:at]), part, ".".join(parts[at + 1 :]))
    return None


def leaf(module: str) -> str:
    """The last part of a module's name, such as "q_proj"."""
    return module.rpartition(".")[2]
