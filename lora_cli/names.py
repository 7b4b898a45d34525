"""What a name means: of a module, an adapter, a repository of the Hub."""


def leaf(module: str) -> str:
    """The last part of a module's name, such as "q_proj"."""
    return module.rpartition(".")[2]
