"""Several workers that do together what is left of a study; each is a process that may die."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from lora_cli.errors import LoraError
from lora_cli.steps.study.folder import Outcome
from lora_cli.steps.study.order import Order

_TRIES = 2
"""How often a piece of work may end its worker before it is given up."""


class Died(Exception):
    """A worker ended before it answered."""


class Unfit(Exception):
    """A worker cannot do any of the work."""


class Hand(Protocol):
    """A worker, as the process sees it that hands work out."""

    def ready(self, order: Order) -> bool:
        """Start it where it does not run, and wait for it; False where the work is over before. Unfit, with why."""

    def ask(self, name: str) -> Outcome:
        """Have it do some work. Died if it ends before it answers; Unfit if it can do none."""

    def end(self) -> None:
        """End its process."""


def together(order: Order, hands: Sequence[Hand], warn: Callable[[str], None]) -> Iterator[Outcome]:
    """Do the work of `order` by these workers, and yield the outcomes of its cells as they end.

    The work of a worker that dies is done again; work that ends two workers fails. A worker that is unfit is left out
    with a warning, and the others go on.

    Raises:
        LoraError: no worker is left.
    """
    told: queue.SimpleQueue[list[Outcome] | BaseException | None] = queue.SimpleQueue()
    tries: dict[str, int] = {}
    threads = [threading.Thread(target=_handed, args=(hand, order, tries, told), daemon=True) for hand in hands]
    for thread in threads:
        thread.start()
    unfit: list[Unfit] = []
    try:
        while threads:
            match told.get():
                case None:
                    threads.pop()
                case Unfit() as reason:
                    unfit.append(reason)
                    warn(str(reason))
                case BaseException() as error:
                    raise error
                case list() as outcomes:
                    yield from outcomes
        if not order.over:
            raise LoraError(f"no worker is left: {unfit[0]}", hint="what is done is kept; run it again to go on")
    finally:
        order.stop()
        for hand in hands:
            hand.end()


def _handed(
    hand: Hand,
    order: Order,
    tries: dict[str, int],
    told: "queue.SimpleQueue[list[Outcome] | BaseException | None]",
) -> None:
    """Hand work to one worker until nothing is left, and tell what becomes of it; None is the end."""
    try:
        while hand.ready(order) and (name := order.take()) is not None:
            try:
                told.put(order.ended(hand.ask(name)))
            except Unfit:
                order.back(name)
                raise
            except Died as death:
                tries[name] = tries.get(name, 0) + 1
                if tries[name] < _TRIES:
                    order.back(name)
                else:
                    error = f"its worker died {_TRIES} times ({death})"
                    hint = "it may need more memory: give fewer --jobs"
                    told.put(order.ended(Outcome(name=name, error=error, hint=hint)))
    except BaseException as error:
        told.put(error)
    finally:
        hand.end()
        told.put(None)
