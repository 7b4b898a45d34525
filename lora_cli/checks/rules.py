"""The rules by which adapters are judged: for which base model, under which names, with which modules."""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

from lora_cli.checks.examine import Facts, examine
from lora_cli.errors import ConfigError, HeaderError
from lora_cli.formats.base_names import tables_digest
from lora_cli.formats.config import parse_config
from lora_cli.formats.header import Header
from lora_cli.formats.skeleton import Skeleton


@dataclass(frozen=True)
class Rules:
    """The base asked for ("" for any), the base's other names, and its modules.

    The base is `name@revision` if it is not on the main branch. `with_skeleton`: judge every adapter by the base's
    modules, not only an adapter without a declared base. `vouched`: the user named base and adapter.
    """

    base: str
    aliases: tuple[str, ...]
    skeleton: Callable[[], Skeleton | None]
    with_skeleton: bool
    vouched: bool = False

    @cached_property
    def digest(self) -> str:
        """A text that is equal for equal rules: a row with another stamp was judged by other rules.

        The part before the colon is equal for rules about one base.
        """
        rules = [self.base, str(self.with_skeleton), str(self.vouched), tables_digest(), *sorted(set(self.aliases))]
        return f"{_digest(self.base)}:{_digest(chr(0).join(rules))}"

    def judge(
        self, config: bytes | None, header: Header | HeaderError | None, names: Collection[str], kind: str = ""
    ) -> Facts:
        """`checks.examine` by these rules."""
        wanted = isinstance(header, Header) and (self.with_skeleton or _names_no_base(config))
        return examine(
            config,
            header,
            file_names=names,
            base_name=self.base,
            base_aliases=self.aliases,
            skeleton=self.skeleton() if wanted else None,
            vouched=self.vouched,
            kind=kind,
        )


def _names_no_base(config: bytes | None) -> bool:
    try:
        return config is not None and not parse_config(config).base
    except ConfigError:
        return False


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
