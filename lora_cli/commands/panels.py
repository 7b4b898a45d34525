"""A command's options in its help, below the headings of their panels."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Typer keeps its copy of Click private; its classes are named here for the types alone.
    from typer._click import Context, HelpFormatter, Parameter

_NOTHING: Mapping[str, list[tuple[str, str]]] = MappingProxyType({})


def write_panels(
    parameters: "Sequence[Parameter]",
    ctx: "Context",
    formatter: "HelpFormatter",
    hidden: Collection[str] = (),
    added: Mapping[str, list[tuple[str, str]]] = _NOTHING,
) -> None:
    """Write the parameters of a command below the headings of their panels, behind the rows `added`, by heading."""
    panels = {heading: [*rows] for heading, rows in added.items()}
    for parameter in parameters:
        row = None if parameter.name in hidden else parameter.get_help_record(ctx)
        if row is not None:
            argument = parameter.param_type_name == "argument"
            heading = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or "Options"
            panels.setdefault(heading, []).append(row)
    # Options without a panel come last: they are the same for every command.
    for heading in sorted(panels, key=lambda heading: heading == "Options"):
        with formatter.section(heading):
            formatter.write_dl(panels[heading])
