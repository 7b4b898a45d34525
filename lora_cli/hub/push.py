"""The only room that writes to the Hub: a repository made, files uploaded, one commit that is there or is not."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from lora_cli.errors import AccessDenied, LoraError, NetworkError, OutputError, Refused, UsageError
from lora_cli.hashes import Stamp, opened_as
from lora_cli.hub.bodies import json_object
from lora_cli.hub.connection import Connection
from lora_cli.hub.patience import running
from lora_cli.hub.problems import Absent, Busy, Unfit, unwrapped
from lora_cli.hub.session import identity
from lora_cli.names import is_commit, is_repo
from lora_cli.records import Progress, silent
from lora_cli.redaction import hide
from lora_cli.text import shortened

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi

T = TypeVar("T")

BRANCH = "main"
_LARGEST_ANSWER = 4_000_000  # bytes; the longest answer names a few files
_MOST_REMARKS = 5
_MB = 1_000_000
_CHANGED = "look at what changed there, then run the same command again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file to upload: its place in the repository, its content, a file or bytes, its hashes and its size.

    `git_sha1` is the hash that git gives it, "" for a file that is too large to be stored in git itself. `stamp` is the
    identity of a file when it was hashed.
    """

    path: str
    content: Path | bytes
    sha256: str
    git_sha1: str
    size: int
    stamp: Stamp | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A repository at the head of its main branch: `files` maps paths to SHA-256 (64 digits) or git's SHA-1 (40)."""

    repo: str
    commit: str
    private: bool
    files: Mapping[str, str]

    def holds(self, uploads: Sequence[Upload]) -> bool:
        """Whether it has all of these files, with these contents."""
        return all(self.files.get(one.path, "") in {one.sha256, one.git_sha1} - {""} for one in uploads)


class Conflict(OutputError):
    """The branch has moved since it was looked at."""


def demand_repo(name: str) -> None:
    """UsageError unless the Hub can have a repository of this name."""
    from huggingface_hub.utils import validate_repo_id

    try:
        if not is_repo(name):
            raise UsageError(f"{shortened(name)!r}: not a repository id", hint="a repository is OWNER/NAME")
        validate_repo_id(name)
    except ValueError as error:
        raise UsageError(f"{shortened(name)!r}: a name that the Hub does not take", hint=shortened(error)) from error


class Pusher(Connection):
    """A connection that may write, with the user's login.

    Raises:
        AccessDenied: there is no login. No request is sent.
    """

    def __init__(self, endpoint: str = "", *, progress: Progress = silent, silence: float | None = None) -> None:
        super().__init__(endpoint, progress=progress, silence=silence)
        self._progress = progress
        login = next((value for name, value in self._usual_headers.items() if name.lower() == "authorization"), "")
        if not login:
            raise AccessDenied("no login to the Hub", hint="hf auth login, or set HF_TOKEN")
        hide(login.partition(" ")[2])

    @cached_property
    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, **identity())

    def look(self, repo: str) -> Remote | None:
        """The repository as it is now; None if the Hub has none of this name, or does not show it."""
        url = f"{self.endpoint}/api/models/{quote(repo)}/revision/{BRANCH}?blobs=true"
        try:
            with _may_write(repo):
                return self.get(url, repo, lambda response: _remote(json_object(response), repo))
        except Absent:
            return None

    def make(self, repo: str, *, private: bool) -> Remote:
        """A new repository. If somebody else made it meanwhile, it is taken as it is.

        Raises:
            AccessDenied: the login may not make it.
        """
        owner, _, name = repo.partition("/")
        wanted = {"name": name, "organization": owner, "visibility": "private" if private else "public"}

        def ask(client: "httpx2.Client") -> Remote:
            response = client.post(
                f"{self.endpoint}/api/repos/create", json=wanted, headers=self._usual_headers, timeout=self._silence
            )
            if response.status_code != 409:
                _demand_success(response)
            # The Hub says 409 for one that exists, and while it is busy with another one of the user's.
            found = self.look(repo)
            if found is None:
                raise Busy(response)
            return found

        try:
            return self._answer(repo, ask)
        except NetworkError as error:
            if not isinstance(error.__cause__, Busy) or error.__cause__.response.status_code != 409:
                raise
            raise NetworkError(
                f"{repo}: the Hub does not make it (409): it exists unseen by this login, or another one is being made",
                hint="check `hf auth whoami`, or rerun later",
            ) from error

    def check_card(self, repo: str, card: str) -> list[str]:
        """What the Hub remarks on the front matter of a model card. Refused if it does not take it."""

        def ask(client: "httpx2.Client") -> list[str]:
            asked = {"content": card, "repoType": "model"}
            response = client.post(
                f"{self.endpoint}/api/validate-yaml", json=asked, headers=self._usual_headers, timeout=self._silence
            )
            if response.status_code == 400:
                raise Refused(
                    f"{repo}: the Hub does not take the front matter of README.md",
                    hint="check the YAML between its first lines of ---",
                )
            _demand_success(response)
            told = response.json().get("warnings") or []
            return [shortened(one["message"]) for one in told[:_MOST_REMARKS]]

        return self._answer(repo, ask)

    def push(self, head: Remote, uploads: Sequence[Upload], gone: Sequence[str], message: str) -> str:
        """Upload files and make one commit of them on top of `head`; returns the commit.

        Args:
            gone: files that the commit deletes.

        Raises:
            Conflict: somebody else has pushed since. NetworkError: the Hub cannot be reached; where the answer to the
                commit alone was lost, the branch is looked at, and the commit that is there is returned.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = [_addition(CommitOperationAdd, one) for one in uploads]
        for one, addition in zip(uploads, additions, strict=True):
            self._upload(head.repo, one, addition)
        deletions = [CommitOperationDelete(path_in_repo=path) for path in gone]

        def ask(_: "httpx2.Client") -> str:
            with _our_way(), _conflicts_told(head.repo):
                made = self._api.create_commit(
                    head.repo,
                    [*additions, *deletions],
                    commit_message=message,
                    parent_commit=head.commit,
                    revision=BRANCH,
                )
            if not is_commit(made.oid):
                raise Unfit("the Hub's answer names no commit")
            return made.oid

        try:
            return self._answer(head.repo, ask)
        except (Conflict, NetworkError) as error:
            # The answer may have been lost on its way, and the commit may be there. It is sent again only on top of
            # the same head, so that it cannot be there twice.
            now = self._look_again(head.repo, error)
            if now.commit != head.commit and now.holds(uploads) and not now.files.keys() & {*gone}:
                return now.commit
            if now.commit != head.commit:
                raise Conflict(f"{head.repo}: somebody else has pushed to it meanwhile", hint=_CHANGED) from error
            raise

    def _upload(self, repo: str, one: Upload, addition: "CommitOperationAdd") -> None:
        """Upload what is not stored in git itself; what the Hub has already is not sent again."""

        def ask(_: "httpx2.Client") -> None:
            attempt = running()
            if attempt is not None and one.size > _MB:
                attempt.on_sent = lambda sent: self._progress(
                    f"uploading {one.path}, MB", min(sent, one.size) // _MB, one.size // _MB
                )
            with _our_way(), self._arrivals_told(one.path):
                self._api.preupload_lfs_files(repo, [addition], revision=BRANCH, num_threads=1, free_memory=False)

        self._answer(repo, ask)
        _demand_unchanged(one)
        # Private: a commit leaves such files out without a word.
        if addition._should_ignore:
            raise Refused(
                f"{repo}: its .gitignore leaves out {one.path}", hint="take this line out of its .gitignore, then rerun"
            )

    @contextmanager
    def _arrivals_told(self, path: str) -> Iterator[None]:
        """Unfit, so that it is tried again from the start, for a file that a store refuses or that did not arrive."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            yield
        except Exception as caught:
            error = unwrapped(caught)
            if isinstance(error, HfHubHTTPError):
                told = error.response
                ours = str(told.request.url).startswith(f"{self.endpoint}/")
                if not (ours and (told.status_code in (401, 403) or "x-error-code" in told.headers)):
                    raise Unfit(f"{path} did not arrive ({told.status_code})") from error
            elif isinstance(error, ValueError):
                raise Unfit(f"the Hub does not take {path} ({shortened(error)})") from error
            raise

    def _look_again(self, repo: str, error: LoraError) -> Remote:
        """The repository after a commit that failed or whose answer was lost; raises `error` if it does not show."""
        try:
            found = self.look(repo)
        except LoraError:
            found = None
        if found is None:
            raise error
        return found

    def _answer(self, repo: str, ask: "Callable[[httpx2.Client], T]") -> T:
        """`attempts` at a request that writes, the length of whose answer is limited."""

        def limited(client: "httpx2.Client") -> T:
            if (attempt := running()) is not None:
                attempt.largest = _LARGEST_ANSWER
            return ask(client)

        with _may_write(repo):
            return self.attempts(repo, limited)


def _addition(kind: "type[CommitOperationAdd]", one: Upload) -> "CommitOperationAdd":
    _demand_unchanged(one)
    made = kind(path_in_repo=one.path, path_or_fileobj=one.content)
    made.upload_info.sha256 = bytes.fromhex(one.sha256)  # else the client reads the whole file again
    return made


def _demand_unchanged(one: Upload) -> None:
    if isinstance(one.content, Path) and one.stamp is not None:
        with opened_as(one.content, one.stamp, f"{one.content}: its bytes"):
            pass


def _remote(found: Any, repo: str) -> Remote:
    """The Hub's description of a repository, with the facts about its files."""
    if found["id"] != repo and is_repo(found["id"]):
        raise UsageError(f"{repo} is called {found['id']} now", hint="push to this name")
    if not (found["id"] == repo and is_commit(found["sha"]) and isinstance(found["private"], bool)):
        raise Unfit("the answer does not come from a Hub")
    files = {}
    for one in found["siblings"]:
        files[one["rfilename"]] = str((one.get("lfs") or {}).get("sha256") or one.get("blobId") or "")
    return Remote(repo=found["id"], commit=found["sha"], private=found["private"], files=files)


def _demand_success(response: "httpx2.Response") -> None:
    from huggingface_hub.utils import hf_raise_for_status

    hf_raise_for_status(response)
    if response.status_code not in (200, 201):
        raise Unfit(f"the Hub answers {response.status_code}")


@contextmanager
def _may_write(repo: str) -> Iterator[None]:
    """The remedy for a login that may not write."""
    try:
        yield
    except AccessDenied as error:
        raise AccessDenied(
            f"{repo}: {error.message.removeprefix(f'{repo}: ')}",
            hint=f"log in with a token that may write to {repo.partition('/')[0]}: hf auth login",
        ) from error


@contextmanager
def _conflicts_told(repo: str) -> Iterator[None]:
    """Conflict for the Hub's refusal to commit on top of a head that is no longer one."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code not in (409, 412):
            raise
        raise Conflict(f"{repo}: the Hub refuses the commit ({error.response.status_code})", hint=_CHANGED) from error


@contextmanager
def _our_way() -> Iterator[None]:
    """Uploads to the Hub itself: those to its other store know no limits of time of ours, and no guard on the token.

    The client's warnings are left out: on its own way of sending a file, and on what `check_card` told already.
    """
    from huggingface_hub import constants

    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_DISABLE_XET = before
