"""What the licences of adapters and base models allow: one small table, and the rules of --license-policy.

The names are those of the Hub's model cards. A name that is not in the table is unknown, and unknown is not permissive.
The table is a reading aid and no legal advice; docs/licences.md shows it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from lora_cli.errors import Refused
from lora_cli.escapes import safe
from lora_cli.options import Flag

Policy = Literal["warn", "commercial", "share-alike", "off"]
POLICIES: Final[tuple[Policy, ...]] = ("warn", "commercial", "share-alike", "off")
PolicyFlag = Annotated[
    Policy | None,
    Flag(help="What restricted licences do: warn, refuse (commercial, share-alike), or off.", default="warn"),
]

PERMISSIVE: Final = frozenset(
    [
        "afl-3.0",
        "apache-2.0",
        "artistic-2.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "bsl-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc0-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "ecl-2.0",
        "isc",
        "mit",
        "ms-pl",
        "ncsa",
        "odc-by",
        "pddl",
        "postgresql",
        "unlicense",
        "wtfpl",
        "zlib",
    ]
)
SHARE_ALIKE: Final[Mapping[str, frozenset[str]]] = {
    name: frozenset(shared.split())
    for name, shared in {
        "agpl-3.0": "agpl-3.0",
        "cc-by-nc-sa-2.0": "cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0",
        "cc-by-nc-sa-3.0": "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0",
        "cc-by-nc-sa-4.0": "cc-by-nc-sa-4.0",
        "cc-by-sa-3.0": "cc-by-sa-3.0 cc-by-sa-4.0",
        "cc-by-sa-4.0": "cc-by-sa-4.0 gpl-3.0",
        "cdla-sharing-1.0": "cdla-sharing-1.0",
        "epl-2.0": "epl-2.0",
        "eupl-1.2": "eupl-1.2",
        "gfdl": "gfdl",
        "gpl": "gpl-2.0 gpl-3.0 agpl-3.0",
        "gpl-2.0": "gpl-2.0",
        "gpl-3.0": "gpl-3.0 agpl-3.0",
        "lgpl-2.1": "lgpl-2.1 gpl-2.0 gpl-3.0 agpl-3.0",
        "lgpl-3.0": "lgpl-3.0 gpl-3.0 agpl-3.0",
        "mpl-2.0": "mpl-2.0 gpl-2.0 gpl-3.0 agpl-3.0 lgpl-2.1 lgpl-3.0",
        "odbl": "odbl",
        "osl-3.0": "osl-3.0",
    }.items()
}
"""Each share-alike licence with those under which a work that holds it may go out."""
NON_COMMERCIAL: Final = frozenset(
    [
        "apple-amlr",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "deepfloyd-if-license",
        "fair-noncommercial-research-license",
        "flux-1-dev-non-commercial-license",
        "intel-research",
        "qwen-research",
    ]
)
NO_DERIVATIVES: Final = frozenset(["cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"])
CUSTOM: Final = frozenset(
    [
        "bigcode-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "gemma",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "openrail",
        "openrail++",
        "qwen",
    ]
)
"""Terms of their own, which allow commercial use under conditions."""
UNKNOWN = "unknown"

_AND = re.compile(r"\s+AND\s+|-and-", re.IGNORECASE)
_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of one licence or of several together, by their names in lower case; `unknown` for others."""

    names: frozenset[str]

    @property
    def restrictions(self) -> tuple[str, ...]:
        """The kinds of terms besides permissive ones, in the table's order."""
        kinds = {
            "share-alike": self.names & SHARE_ALIKE.keys(),
            "non-commercial": self.names & NON_COMMERCIAL,
            "no-derivatives": self.names & NO_DERIVATIVES,
            "custom": self.names & CUSTOM,
            "unknown": self.names & {UNKNOWN},
        }
        return tuple(kind for kind, found in kinds.items() if found)

    @property
    def commercial(self) -> bool:
        """Whether commercial use is allowed, maybe under conditions. False where it is forbidden or not stated."""
        return not self.names & NON_COMMERCIAL and UNKNOWN not in self.names


def terms_of(licence: str) -> Terms:
    """The terms behind the name of a licence in a card; several names are joined by AND."""
    names = (name.strip().lower() for name in _AND.split(licence))
    known = PERMISSIVE | SHARE_ALIKE.keys() | NON_COMMERCIAL | NO_DERIVATIVES | CUSTOM
    return Terms(frozenset(name if name in known else UNKNOWN for name in names))


def together(licences: Iterable[str]) -> str:
    """One name for the licences of all parts of a work, "" if none of them is stated.

    The Hub takes lower-case letters, digits, dots and dashes: the names are joined by `-and-`.
    """
    parts = {name.strip().lower() for licence in licences for name in _AND.split(licence)}
    if parts <= {"", UNKNOWN}:
        return ""
    return "-and-".join(sorted(name if _NAME.fullmatch(name) else UNKNOWN for name in parts))


def conflict(licences: Iterable[str]) -> bool:
    """Whether the share-alike terms of some parts of a work forbid to mix them with the others.

    There must be one licence under which all share-alike parts may go out. Beside it no part may restrict more: an
    unknown or custom licence, one without derivatives, or a non-commercial one beside one that is not.
    """
    names = {name for licence in licences for name in terms_of(licence).names}
    shared = [SHARE_ALIKE[name] for name in names & SHARE_ALIKE.keys()]
    if not shared:
        return False
    common = frozenset.intersection(*shared)
    if names & NON_COMMERCIAL:
        common &= NON_COMMERCIAL
    return not common or bool(names & (CUSTOM | NO_DERIVATIVES | {UNKNOWN}))


def restrictions_of(policy: Policy, adapters: Mapping[str, str], base: tuple[str, str] | None = None) -> str:
    """The line that a policy says about adapters, by their ids, and their base model; "" for none.

    Args:
        adapters: id → licence, "" for none.
        base: name and licence of the base; only its stated restrictions are said, unless the policy is "commercial".

    Raises Refused where the policy forbids the mix.
    """
    if policy == "off":
        return ""
    parts = dict(adapters)
    if base is not None and (base[1] or policy == "commercial"):
        parts[f"base {base[0]}"] = base[1]
    terms = {name: terms_of(licence) for name, licence in parts.items()}
    if policy == "commercial" and (barred := {name: parts[name] for name in parts if not terms[name].commercial}):
        raise Refused(
            f"licence without commercial use: {_listed(barred)}",
            hint="leave them out, or read their terms and give --license-policy warn",
        )
    if policy == "share-alike" and conflict(parts.values()):
        bound = {name: parts[name] for name in parts if terms[name].restrictions}
        raise Refused(
            f"share-alike terms conflict: {_listed(bound)}",
            hint="leave some out, or read their terms and give --license-policy warn",
        )
    restricted = {name: parts[name] for name in parts if terms[name].restrictions}
    return f"licences: {_listed(restricted)}" if restricted else ""


def _listed(licences: Mapping[str, str]) -> str:
    """Names with their licences and restrictions; the rest of many as a number."""
    said = []
    for name, licence in [*licences.items()][:_MOST_NAMED]:
        kinds = ", ".join(terms_of(licence).restrictions)
        said.append(f"{safe(name)} {safe(licence)} ({kinds})" if licence else f"{safe(name)} (not stated)")
    more = len(licences) - len(said)
    return "; ".join(said) + (f"; and {more} more" if more else "")
