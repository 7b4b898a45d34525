"""The copies that select --dedupe leaves out: by hashes and by sketches, of which no weights are read."""

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.text import counted


class Copies:
    """Candidates judged one by one, the best first: each is spared unless it is a copy of one spared before."""

    def __init__(self, catalogue: Catalogue, cosine: float) -> None:
        from lora_cli.steps.pool.sketched import Distinct

        self._catalogue, self._cosine, self._taken = catalogue, cosine, Distinct(cosine)

    def spare(self, pinned: str, sha256: str) -> bool:
        """Whether the candidate `id@commit`, of weights with this hash ("" if it is not known), is no copy."""
        id, _, commit = pinned.rpartition("@")
        return self._taken.take(sha256, self._catalogue.sketches.of([(id, commit)]).get(id))

    def told(self) -> str:
        """What was left out, and what could not be compared."""
        found = self._taken
        near = "1 near copy" if found.near == 1 else f"{found.near:,} near copies"
        exact = f" and {found.exact:,} of the same weights" if found.exact else ""
        unknown = f"; {counted(found.without, 'adapter')} without a sketch compared by hash alone: "
        how = "lora pool verify --deep makes sketches"
        return f"--dedupe {self._cosine:g}: left out {near}{exact}" + (unknown + how if found.without else "")
