"""The options of a verb as one typed record, from which its flags, its settings and the check of a lock are made.

A field is written once, as `name: Annotated[type, Flag(help)] = default`. Its flag is `--name` with dashes, its setting
in run.json is `name`; a trailing underscore keeps a field apart from a word of Python (`lambda_` is `--lambda`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, get_type_hints

import msgspec

from lora_cli.errors import UsageError
from lora_cli.text import nearest, shortened


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """The form of a field on the command line.

    `default` is the default's name in the help, if the value itself is not clear. `panel` is the flag's heading in the
    help. `name` is the flag's name, if it differs from the field's.
    """

    help: str
    short: str = ""
    metavar: str = ""
    default: str = ""
    panel: str = ""
    minimum: int | None = None
    name: str = ""


def setting(field: str) -> str:
    """The name of a field in run.json."""
    return field.rstrip("_")


_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "array": "a list",
    "object": "a table",
}  # fmt: skip
_TYPED = re.compile(r"Expected `([^`]+)`, got `[^`]+` - at `\$\.(\w+)[^`]*`", re.ASCII)
_LISTED = re.compile(r"(Invalid enum value .*) - at `\$\.(\w+)[^`]*`", re.ASCII)


def _in_words(message: str, values: Mapping[str, Any]) -> str:
    """What msgspec says about a value of another type, with the option's name and the value."""
    if (found := _TYPED.fullmatch(message)) is not None:
        kinds = [_KINDS.get(kind, kind) for kind in found[1].split(" | ") if kind != "null"]
        value = next((given for name, given in values.items() if setting(name) == found[2]), None)
        return f"{found[2]} takes {' or '.join(kinds)}, not {shortened(repr(value))}"
    listed = _LISTED.fullmatch(message)
    return message if listed is None else f"{listed[2]}: {listed[1][0].lower()}{listed[1][1:]}"


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=setting):
    """The base class of every verb's options."""

    @property
    def settings(self) -> dict[str, Any]:
        """The options as run.json holds them."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @classmethod
    def of_settings(cls, settings: Any) -> Self:
        """The options that `settings` hold.

        Raises:
            msgspec.ValidationError: an unknown option, or a value of another type.
        """
        return msgspec.convert(settings, cls, dec_hook=lambda kind, value: kind(value))

    @classmethod
    def of(cls, **values: Any) -> Self:
        """The options with these values, by the names of the fields; a number may stand for a text, such as a rank.

        Raises:
            UsageError: an unknown option, or an invalid value.
        """
        for name in values.keys() - {*cls.__struct_fields__}:
            hint = nearest(name, cls.__struct_fields__, f"there are {', '.join(cls.__struct_fields__)}")
            raise UsageError(f"unknown option {name!r}", hint=hint)
        try:
            made = cls.of_settings({setting(name): cls._readable(name, value) for name, value in values.items()})
        except msgspec.ValidationError as error:
            raise UsageError(_in_words(str(error), values)) from None
        for name, (_, flag) in cls.flags().items():
            value = getattr(made, name)
            if flag.minimum is not None and value is not None and value < flag.minimum:
                raise UsageError(f"--{setting(name).replace('_', '-')} must be at least {flag.minimum}, not {value}")
        return made

    @classmethod
    def _readable(cls, field: str, value: Any) -> Any:
        """A whole number as text, if the option's type is text."""
        return str(value) if type(value) is int and cls.flags().get(field, (None,))[0] is str else value

    @classmethod
    def flags(cls) -> Mapping[str, tuple[Any, Flag]]:
        """Field → (type, Flag) of every field that is a flag."""
        hints = get_type_hints(cls, include_extras=True)
        found = {}
        for field in cls.__struct_fields__:
            marks = [mark for mark in getattr(hints[field], "__metadata__", ()) if isinstance(mark, Flag)]
            if marks:
                found[field] = (hints[field].__origin__, marks[0])
        return found
