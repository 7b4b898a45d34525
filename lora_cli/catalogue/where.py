"""The conditions of `--where` and the columns of `--sort`: a small typed grammar, turned into SQL with parameters.

    COLUMN OP VALUE        rank<=16   licence=apache-2.0,mit   author!=alice   base~llama   created_at>=2026-01-01
    OP                     = == != < <= > >= ~ (contains) !~ (does not contain); ~ and = on text ignore case
    VALUE                  a text; a number, also as 10k, 2.5M, 300MB, 1e-3; true or false; for = and != several with
                           commas between them; `none` for what is not known

No user text becomes part of the SQL: columns come from the list below, values are passed as parameters.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from lora_cli.errors import UsageError
from lora_cli.text import nearest

Kind = Literal["text", "number", "flag", "list"]
Value = str | int | float | None

COLUMNS: Final[Mapping[str, Kind]] = {
    "id": "text",
    "commit": "text",
    "source": "text",
    "repo": "text",
    "subfolder": "text",
    "author": "text",
    "base_declared": "text",
    "revision": "text",
    "base": "text",
    "base_match": "text",
    "peft_type": "text",
    "rank": "number",
    "alpha": "number",
    "scale": "number",
    "rslora": "flag",
    "target_modules": "list",
    "modules": "number",
    "layers": "number",
    "dtype": "text",
    "parameters": "number",
    "bytes": "number",
    "sha256": "text",
    "hub_sha256": "text",
    "norm": "number",
    "licence": "text",
    "datasets": "list",
    "downloads": "number",
    "likes": "number",
    "gated": "text",
    "created_at": "text",
    "modified_at": "text",
    "status": "text",
    "reason": "text",
    "notes": "text",
}
_SPELLINGS: Final = {
    "license": "licence",
    "size": "bytes",
    "r": "rank",
    "target": "target_modules",
    "created": "created_at",
    "modified": "modified_at",
}
_CONDITION = re.compile(r"\s*([A-Za-z_0-9]+)\s*(==|!=|<=|>=|!~|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*([kKMGT]?)(i?)[bB]?")
_POWERS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_LONGEST = 1_000


def conditions(texts: Sequence[str]) -> tuple[str, list[Value]]:
    """The SQL of all conditions together (`1` for none) and its parameters. UsageError names the bad condition."""
    parts, values = ["1"], list[Value]()
    for text in texts:
        sql, more = _condition(text)
        parts.append(sql)
        values += more
    return " AND ".join(parts), values


def ordering(text: str) -> str:
    """The SQL after ORDER BY for a `--sort` column: ascending, with a leading `-` descending.

    Unknown values come last in both directions, and equal rows are ordered by id.
    """
    name = _quoted(sort_column(text))
    return f"nullif({name}, '') IS NULL, {name} {'DESC' if text.startswith('-') else 'ASC'}, id"


def sort_column(text: str) -> str:
    """The column that a `--sort` names. UsageError for an unknown one."""
    return _column(text.removeprefix("-"), text)


def columns_in(texts: Sequence[str]) -> list[str]:
    """The columns that conditions name."""
    return [_column(found[1], text) for text in texts if (found := _CONDITION.fullmatch(text))]


def _condition(text: str) -> tuple[str, list[Value]]:
    found = _CONDITION.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        raise UsageError(
            f"--where {text[:80]!r}: not a condition",
            hint="COLUMN OP VALUE, such as 'rank<=16' or 'licence=apache-2.0'",
        )
    column = _column(found[1], text)
    operator, value = found[2].replace("==", "="), found[3]
    kind, name = COLUMNS[column], _quoted(column)
    if value.lower() == "none" and operator in ("=", "!="):
        return f"({name} IS NULL OR {name} = '') = ?", [int(operator == "=")]
    if operator in ("~", "!~"):
        if kind not in ("text", "list"):
            raise UsageError(f"--where {text!r}: {operator} is for text, {column} is a {kind}")
        return f"{name} {'NOT ' if operator == '!~' else ''}LIKE ? ESCAPE '\\'", [f"%{_literal(value)}%"]
    if operator in ("=", "!="):
        choices = [choice.strip() for choice in value.split(",")]
        alternatives = [_equal(column, choice, text) for choice in choices]
        sql = " OR ".join(part for part, _ in alternatives)
        # An unknown value is not equal to anything, so != keeps it.
        return f"coalesce(({sql}), 0) = ?", [*(v for _, more in alternatives for v in more), int(operator == "=")]
    if kind in ("flag", "list"):
        raise UsageError(f"--where {text!r}: {operator} cannot be used with {column}; use = or !=")
    return f"{name} {operator} ?", [_typed(column, value, text)]


def _equal(column: str, value: str, text: str) -> tuple[str, list[Value]]:
    name = _quoted(column)
    if COLUMNS[column] == "list":
        return f"EXISTS (SELECT 1 FROM json_each({name}) WHERE value = ? COLLATE NOCASE)", [value]
    if COLUMNS[column] == "text":
        return f"{name} = ? COLLATE NOCASE", [value]
    return f"{name} = ?", [_typed(column, value, text)]


def _typed(column: str, value: str, text: str) -> Value:
    kind = COLUMNS[column]
    if kind == "flag":
        if value.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise UsageError(f"--where {text!r}: {column} is true or false, not {value!r}")
        return int(value.lower() in ("true", "yes", "1"))
    if kind == "number":
        number = number_in(value)
        if number is None:
            raise UsageError(f"--where {text!r}: {column} is a number, not {value!r}")
        return number
    return value


def number_in(value: str) -> int | float | None:
    """The number of a text such as 10k, 2.5M, 300MB or 1e-3; None for another text."""
    found = _NUMBER.fullmatch(value)
    if found is None:
        return None
    number = float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].upper()]
    return int(number) if number.is_integer() and abs(number) < 2**63 else number


def _column(name: str, text: str) -> str:
    column = _SPELLINGS.get(name.lower(), name.lower())
    if column not in COLUMNS:
        hint = nearest(column, COLUMNS, f"columns are {', '.join(COLUMNS)}")
        raise UsageError(f"{text[:80]!r}: no column {name[:40]!r}", hint=hint)
    return column


def _quoted(column: str) -> str:
    return f'"{column}"'


def _literal(value: str) -> str:
    """`value` with LIKE's wildcards escaped."""
    return re.sub(r"([\\%_])", r"\\\1", value)
