"""The parts of a model card that a merge and a router share."""

from collections.abc import Sequence

from lora_cli.escapes import safe
from lora_cli.licences import terms_of, together
from lora_cli.steps.pool.licences import Stated


def licence_of_all(parents: Sequence[Stated]) -> dict[str, str]:
    """The licence of the result in the Hub's metadata: that of all parents, or a name made of theirs."""
    name = together(one.licence for one in parents)
    if not name:
        return {}
    known = terms_of(name).names == {name}
    return {"license": name} if known else {"license": "other", "license_name": name}


def stated(licence: str) -> str:
    """A licence as a code span, or that there is none."""
    return code(licence) if licence else "not stated"


def code(text: str) -> str:
    """A stranger's text as a code span that it cannot leave."""
    return "`" + safe(text).replace("`", "'").replace("|", "/") + "`"
