"""Check many adapters at once. What is measured is stored as it comes, so that a check that was killed goes on."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.checks.spectra import Spread
from lora_cli.errors import DataError, OutputError, Refused, UsageError
from lora_cli.formats.skeleton import Skeleton
from lora_cli.hub.client import Hub
from lora_cli.records import Adapter, Progress, silent
from lora_cli.steps.bases import look_here
from lora_cli.steps.pool.verify import Measured, Norms, Verdict, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Checking:
    """How adapters are checked: against `base` with these `aliases`, "" for any; `jobs` at a time.

    `force` measures weights anew that were measured before.
    """

    base: str = ""
    aliases: Sequence[str] = ()
    deep: bool = False
    norms: Norms = Norms()  # noqa: RUF009 - it is frozen
    jobs: int = 4
    force: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.norms.least < self.norms.most:
            raise UsageError("--min-norm must be below --max-norm, and neither below 0")


def verify_all(
    catalogue: Catalogue, adapters: Sequence[Adapter], how: Checking, *, hub: Hub, progress: Progress = silent
) -> list[Verdict]:
    """The verdicts on `adapters`, in their order; spreads and sketches of catalogued ones are stored.

    Memory does not grow with the size of the files together: `how.jobs` files are in work, and an adapter leaves its
    spreads, 140 kB of an 8B model, and its sketch, 4 kB. Raises the errors of `verify`.
    """
    skeletons = _skeletons(how.base, adapters)
    verdicts: dict[int, Verdict] = {}
    with ThreadPoolExecutor(how.jobs) as pool:

        def checked(adapter: Adapter) -> Verdict:
            try:
                return verify(
                    adapter,
                    hub=hub,
                    base=how.base,
                    aliases=how.aliases,
                    skeleton=skeletons[how.base or adapter.base],
                    deep=how.deep,
                    norms=how.norms,
                    known=_measured(catalogue, adapter) if how.deep and not how.force else None,
                )
            except (DataError, Refused) as error:
                # A fault of one adapter is its verdict: the others are still to be checked.
                reason = error.message.removeprefix(f"{adapter.id}: ")
                refused = replace(adapter, status="unusable", reason=reason)
                return Verdict(adapter=refused, coverage=None, deep=False)

        pending: dict[Future[Verdict], int] = {pool.submit(checked, one): at for at, one in enumerate(adapters)}
        progress("verifying adapters", 0, len(pending))
        try:
            for done, future in enumerate(as_completed(pending), 1):
                verdict = verdicts[pending[future]] = future.result()
                _remember(catalogue, verdict)
                progress("verifying adapters", done, len(pending))
        except BaseException:
            hub.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [verdicts[place] for place in range(len(adapters))]


def _skeletons(base: str, adapters: Sequence[Adapter]) -> Mapping[str, Skeleton | None]:
    """The modules of each base model that counts, None for one whose configuration is not here."""
    looks = {name: look_here(name) for name in ({base} if base else {one.base for one in adapters})}
    return {name: look() if look else None for name, look in looks.items()}


def _measured(catalogue: Catalogue, adapter: Adapter) -> Measured | None:
    """What the catalogue has measured of an adapter, whatever its bytes are by now."""
    at = [(adapter.id, adapter.commit)]
    sketch = catalogue.sketches.of(at).get(adapter.id)
    spreads = catalogue.spreads.at(*at[0]) if sketch else None
    if sketch is None or spreads is None:
        return None
    return Measured(spreads={name: Spread(*values) for name, values in spreads.items()}, sketch=sketch)


def _remember(catalogue: Catalogue, verdict: Verdict) -> None:
    at = verdict.adapter.id, verdict.adapter.commit
    # Measures can be taken again: a catalogue that cannot be written is no reason to say nothing.
    with suppress(OutputError):
        if verdict.spreads is not None and verdict.sketch is not None and catalogue.known([at[0]]):
            catalogue.spreads.remember({at: verdict.spreads})
            catalogue.sketches.remember({at: verdict.sketch})
