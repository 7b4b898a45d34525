"""The order in which several workers do what is left of a study: needs first, and what has all its needs."""

from collections.abc import Sequence
from threading import Condition

from lora_cli.steps.study.folder import Outcome, Piece, WorkFolder


class Order:
    """What is left of some cells and their needs. Workers in threads take from it, and say what became of it."""

    def __init__(self, folder: WorkFolder, cells: Sequence[Piece]) -> None:
        done = folder.done(cells)
        left = [cell for cell in cells if cell.name not in done]
        self._cells = dict.fromkeys(cell.name for cell in left)
        wants = {piece.name: piece.needs for piece in [*folder.open_needs(left), *left]}
        self._waits = {name: {*wanted} & wants.keys() for name, wanted in wants.items()}
        self._awaited = {name for wanted in self._waits.values() for name in wanted}
        self._changed = Condition()
        self._under_way: set[str] = set()

    @property
    def cells(self) -> list[str]:
        """The cells that were left at the beginning."""
        return [*self._cells]

    @property
    def over(self) -> bool:
        """Whether nothing is left or under way."""
        with self._changed:
            return not self._waits and not self._under_way

    def take(self) -> str | None:
        """The next work that has all it needs; waits where all of it is under way; None at the end."""
        with self._changed:
            while True:
                for name, needs in self._waits.items():
                    if not needs:
                        del self._waits[name]
                        self._under_way.add(name)
                        return name
                if not self._under_way:
                    return None
                self._changed.wait()

    def stop(self) -> None:
        """Hand out no more work."""
        with self._changed:
            self._waits.clear()
            self._under_way.clear()
            self._changed.notify_all()

    def back(self, name: str) -> None:
        """Somebody else has to do this work."""
        with self._changed:
            if name in self._under_way:
                self._under_way.discard(name)
                self._waits = {name: set(), **self._waits}
            self._changed.notify_all()

    def ended(self, outcome: Outcome) -> list[Outcome]:
        """The outcomes of the cells that end with this one: itself, or those that need what failed."""
        with self._changed:
            self._under_way.discard(outcome.name)
            found = [outcome] if outcome.name in self._cells else []
            if outcome.error:
                found += self._without(outcome)
            if outcome.name in self._awaited:
                for needs in self._waits.values():
                    needs.discard(outcome.name)
            self._changed.notify_all()
            return found

    def _without(self, failed: Outcome) -> list[Outcome]:
        """The outcomes of what waits for something that failed, which is left out."""
        found = []
        for name in [name for name, needs in self._waits.items() if failed.name in needs]:
            del self._waits[name]
            lost = Outcome(name=name, error=f"{failed.name}: {failed.error}", hint=failed.hint)
            found += [lost] if name in self._cells else []
            found += self._without(lost)
        return found
