"""From the user's request for a push to one commit on the Hub, recorded as a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_cli.catalogue import runs, scores
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NothingMatched, Refused, UsageError
from lora_cli.formats.base_names import split_revision
from lora_cli.formats.card import CARD_FILE, datasets_of, read_card
from lora_cli.formats.kinds import WEIGHTS_NAME
from lora_cli.hub.push import Pusher, Remote, Upload, demand_repo
from lora_cli.licences import Policy, restrictions_of, terms_of
from lora_cli.records import Progress, silent, unheard
from lora_cli.settings import Settings
from lora_cli.steps.pool.licences import Stated, stated_of_base
from lora_cli.steps.push.card import Parent, Told, base_off_hub, full_card
from lora_cli.steps.push.result import FILES, Result, read_result, upload_of

UP_TO_DATE: Final = "up to date"
_ASKING = ("commercial", "share-alike")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """A result on the Hub: its place, its commit there, and whether it was there already (`fresh` is false)."""

    repo: str
    commit: str
    url: str
    private: bool
    fresh: bool


class PushRequest:
    """The user's request to push the result in a folder to a repository; everything that needs no Hub is checked.

    Args:
        dry: whether nothing is to be sent; else the Hub is asked for the licence of the base where a policy needs it.

    Raises:
        UsageError: no name of a repository. AccessDenied: no login, before any request. Else as `read_result` does,
            and Refused where licences do not permit it.
    """

    def __init__(
        self,
        folder: str,
        repo: str,
        settings: Settings,
        *,
        dry: bool = False,
        announce: Callable[[str], None] = unheard,
        progress: Progress = silent,
    ) -> None:
        demand_repo(repo)
        if not dry:
            Pusher()
        self.repo, self.settings, self.announce = repo, settings, announce
        self.result = read_result(folder, progress)
        told = _told(self.result, settings.db, ask=not dry and settings.license_policy in _ASKING)
        self.notice = _licences(settings.license_policy, self.result, told)
        self.base_off_hub = base_off_hub(self.result)
        self.card = self.result.own_card or full_card(self.result, repo, told)
        self.uploads = [upload_of(CARD_FILE, self.card.encode()), *self.result.uploads]

    @property
    def plan(self) -> dict[str, Any]:
        """What would be pushed, as data."""
        return {
            "repo": self.repo,
            "folder": str(self.result.folder),
            "bytes": sum(one.size for one in self.uploads),
            "files": files_of(self.uploads),
            "own_card": bool(self.result.own_card),
            "card": self.card,
        }

    def look(self, progress: Progress = silent) -> Remote | None:
        """The repository as it is, None if there is none."""
        return Pusher(progress=progress).look(self.repo)

    def run(self, found: Remote | None, *, private: bool = False, progress: Progress = silent) -> Pushed:
        """Push, unless the Hub has it all already, and record the run.

        Args:
            found: what `look` gave; None to make the repository.
            private: whether it is to be private.

        Raises:
            AccessDenied: a login that may not write. UsageError: a private push to a public repository.
            Conflict: somebody else has pushed meanwhile. Else as every request to the Hub.
        """
        pusher, result = Pusher(progress=progress), self.result
        weights = next(one.sha256 for one in self.uploads if one.path == WEIGHTS_NAME)
        recorded = {"repo": self.repo, "license_policy": self.settings.license_policy}
        with runs.recorded(self.settings.db, "push", recorded, {result.pinned: weights}, result.folder) as run:
            if found is None:
                self.announce(f"making {self.repo}, {'private' if private else 'public'}")
                found = pusher.make(self.repo, private=private)
            if private and not found.private:
                raise UsageError(
                    f"{self.repo} is public already, and nothing was pushed to it",
                    hint="push to another name, or make it private on its page",
                )
            pushed = self._commit(pusher, found)
            run.outputs.update({one.path: one.sha256 for one in self.uploads})
            run.results.update(repo=pushed.repo, commit=pushed.commit, url=pushed.url, files=files_of(self.uploads))
        return pushed

    def _commit(self, pusher: Pusher, remote: Remote) -> Pushed:
        gone = [name for name in FILES if name in remote.files and name not in {one.path for one in self.uploads}]
        fresh = bool(gone) or not remote.holds(self.uploads)
        commit = remote.commit
        if fresh:
            for remark in pusher.check_card(remote.repo, self.card):
                self.announce(f"the Hub remarks on README.md: {remark}")
            if replaced := [one.path for one in self.uploads if one.path in remote.files]:
                self.announce(f"replacing {', '.join(replaced)} of {remote.repo}@{remote.commit[:8]}")
            title = f"lora {self.result.verb}: {self.result.pinned.rpartition('@')[2][:8]}"
            commit = pusher.push(remote, self.uploads, gone, title)
        url = f"{pusher.endpoint}/{remote.repo}"
        return Pushed(repo=remote.repo, commit=commit, url=url, private=remote.private, fresh=fresh)


def files_of(uploads: Sequence[Upload]) -> list[dict[str, Any]]:
    """Path, size and hash of each file."""
    return [{"path": one.path, "bytes": one.size, "sha256": one.sha256} for one in uploads]


def _told(result: Result, db: Path, *, ask: bool) -> Told:
    """What the catalogue and the cards on this machine add to a result's record."""
    found = result.record["results"].get("licences")
    licences: Mapping[str, str] = found if isinstance(found, dict) else {}
    name, revision = split_revision(result.config.pinned_base)
    base = Stated(str(licences.get("base") or ""))
    if not base.licence:
        base = stated_of_base(f"{name}@{revision}" if revision else name, ask=ask)
    lock = result.record.get("merge.lock", {}).get("parents")
    sources = lock if isinstance(lock, dict) else {}
    with Catalogue(db) as catalogue:
        parents = {
            pinned: _parent(pinned, str(licences.get(pinned) or ""), sources.get(pinned), catalogue, db)
            for pinned in result.parents
        }
    written = "" if result.own_card else read_card(result.folder)
    return Told(
        parents=parents,
        base=base,
        datasets=sorted(datasets_of(written)),
        scores=scores.of_version(db, result.pinned.rpartition("@")[2]),
    )


def _parent(pinned: str, licence: str, locked: Any, catalogue: Catalogue, db: Path) -> Parent:
    """A parent under the name by which others find it: on the Hub if it came from there, or was pushed there."""
    id, _, commit = pinned.rpartition("@")
    source = locked.get("source") if isinstance(locked, dict) else None
    if source is None:
        try:
            row = catalogue.get(id)
            source = row.source if row.commit == commit else None
        except NothingMatched:
            source = None
    if source == "hub":
        return Parent(pinned=pinned, on_hub=True, licence=licence)
    there = runs.pushed_as(db, commit)
    return Parent(pinned=there[0] if there else pinned, on_hub=bool(there), licence=licence)


def _licences(policy: Policy, result: Result, told: Told) -> str:
    """The line that the policy says of a result; Refused where it, or a parent without derivatives, forbids to publish.

    A result without adapters as parents, and not trained here, has itself a licence that nobody stated.
    """
    parts = {name: one.licence for name, one in told.parents.items()}
    if not parts and result.verb != "train":
        parts = {result.pinned: ""}
    base = split_revision(result.config.pinned_base)[0]
    said = restrictions_of(policy, parts, (base, told.base.licence))
    barred = [name for name, licence in parts.items() if "no-derivatives" in terms_of(licence).restrictions]
    if barred and policy != "off":
        raise Refused(
            f"licence without derivatives: {barred[0]} {parts[barred[0]]}",
            hint="leave it out of the result, or read its terms and give --license-policy off",
        )
    return said
