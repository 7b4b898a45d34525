"""Ollama: the GGUF file of llama.cpp, and a Modelfile that names it and the base.

A Modelfile is read line by line; a value between quotes ends at the line's last quote. No character in it is escaped,
so that a name with a quote or a line break is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.errors import Refused
from lora_cli.escapes import safe
from lora_cli.exports import Export, Plan, Source
from lora_cli.exports.gguf import FILE, GgufPlan, plan
from lora_cli.formats.gguf import is_plain
from lora_cli.records import Progress

if TYPE_CHECKING:
    from lora_cli.formats.reader import OpenAdapter

_MODELFILE = "Modelfile"


@dataclass(frozen=True, kw_only=True, eq=False)
class OllamaPlan(GgufPlan):
    """The GGUF file and the Modelfile."""

    modelfile: str

    @property
    def files(self) -> Mapping[str, int]:
        return {**super().files, _MODELFILE: len(self.modelfile.encode())}

    def write(self, folder: Path, progress: Progress) -> None:
        super().write(folder, progress)
        (folder / _MODELFILE).write_text(self.modelfile, encoding="utf-8")


class Ollama(Export):
    """Ollama."""

    program = "Ollama"
    version = "of November 2026"

    def sure(self, adapter: "OpenAdapter", config: Mapping[str, Any]) -> bool:
        return is_plain(adapter, config)

    def plan(self, source: Source, dtype: str) -> Plan:
        base = source.called or source.base
        if '"' in base or safe(base) != base:
            raise Refused(
                f"{safe(base)}: a Modelfile cannot hold this name of the base",
                hint="give Ollama's name of it, or its GGUF file: --base-name",
            )
        file = plan(source, dtype, self.title)
        note = "" if source.called else f"FROM names {base}: give Ollama's name of it, or its GGUF file, by --base-name"
        return OllamaPlan(
            **{one.name: getattr(file, one.name) for one in fields(file) if one.name != "notes"},
            notes=(note,) if note else (),
            modelfile=f'FROM "{base}"\nADAPTER ./{FILE}\n',
        )


ollama = Ollama()
