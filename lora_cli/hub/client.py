"""Questions to the Hugging Face Hub: list adapters, read parts of files, download one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlencode

from lora_cli.errors import NetworkError
from lora_cli.hub.bodies import Part, file_range, json_list, json_object, next_page, whole_file
from lora_cli.hub.cache import cache_folder, content_oid
from lora_cli.hub.connection import Connection
from lora_cli.hub.listing import EXPAND, Listed, is_id, listed, with_limit
from lora_cli.hub.problems import Absent, Gated, Unfit, raise_translated
from lora_cli.hub.session import identity
from lora_cli.names import is_commit

if TYPE_CHECKING:
    import httpx2

_PAGE_SIZES = (1000, 200, 40)  # of the first, second and further tries: a smaller page is easier for the Hub
_MOST_PAGES = 10_000
_MOST_PAGES_WITHOUT_NEWS = 3
_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class FileFacts(NamedTuple):
    """The Hub's facts about a file: `oid` is its SHA-256 (64 hex digits), or outside LFS a git blob's SHA-1 (40)."""

    oid: str
    size: int


class Page(NamedTuple):
    """A page of a listing, and the address of the next one, "" after the last."""

    repositories: list[Listed]
    following: str


class Hub(Connection):
    """The questions that this tool asks a Hub, each one request unless it says otherwise."""

    def list_adapters(
        self, base: str, *, author: str = "", since: str = "", limit: int | None = None, start: str = ""
    ) -> Iterator[Page]:
        """The repositories tagged as PEFT adapters of `base`, newest first, one page at a time.

        A repeated repository is yielded once; a page that may cut the listing short raises.

        Args:
            base: the base model's Hub id.
            author: only the repositories of this user or organisation, "" for all.
            since: skip (and do not request) repositories created before this ISO time.
            limit: the most repositories to list.
            start: the address of the page to begin with, as an earlier page gave it; another server's is not used.
        """
        query: list[tuple[str, Any]] = [("filter", f"base_model:adapter:{base}"), ("filter", "peft")]
        query += [("author", author)] if author else []
        query += [("sort", "createdAt"), *(("expand", name) for name in EXPAND)]
        query.append(("limit", min(limit or _PAGE_SIZES[0], _PAGE_SIZES[0])))
        first = f"{self.endpoint}/api/models?{urlencode(query)}"
        url = start if start.startswith(f"{self.endpoint}/api/models?") else first
        seen: set[str] = set()
        old = 0
        for _ in range(_MOST_PAGES):
            items, url = self._page(url, f"the listing of {base}")
            page: list[Listed] = []
            for item in items:
                if item.hub_id in seen:
                    continue
                if since and item.created_at and item.created_at < since:
                    url = ""
                    break
                seen.add(item.hub_id)
                page.append(item)
                if limit is not None and len(seen) >= limit:
                    url = ""
                    break
            yield Page(page, url)
            old = 0 if page else old + 1
            if not url:
                return
            if old >= _MOST_PAGES_WITHOUT_NEWS:
                break
        raise NetworkError(f"the listing of {base} does not end", hint="rerun later")

    def names_of_models(self, **query: str) -> list[str]:
        """The ids of the most downloaded models that fit a query such as filter=… or search=…, at most a page."""
        asked = [*query.items(), ("sort", "downloads"), ("expand", "author"), ("limit", str(_PAGE_SIZES[0]))]
        url = f"{self.endpoint}/api/models?{urlencode(asked)}"
        items = self.get(url, "the copies of a base", lambda response: [*json_list(response)])
        names = [item.get("id") for item in items if isinstance(item, dict)]
        return [name for name in names if isinstance(name, str) and is_id(name)]

    def repository(self, repo: str, revision: str = "") -> Listed:
        """The listing's entry for one repository at a branch, tag or whole commit, "" for its main branch."""
        at = f"/revision/{quote(revision, safe='')}" if revision else ""
        query = urlencode([("expand", name) for name in EXPAND])
        item = self.get(f"{self.endpoint}/api/models/{quote(repo)}{at}?{query}", repo, json_object)
        found = listed(item)
        if found is None or (is_commit(revision) and found.commit != revision):
            raise NetworkError(
                f"{repo}: the Hub answered with another repository or revision", hint="check HF_ENDPOINT"
            )
        return found

    def exists(self, repo: str) -> bool:
        """False if the Hub says that it has no such repository (any more).

        Raises NothingMatched for a refusal that may not be the Hub's own.
        """
        try:
            self.get(f"{self.endpoint}/api/models/{quote(repo)}?expand=sha", repo, json_object)
        except Gated:
            return True
        except Absent:
            return False
        return True

    def read_newest(self, repo: str, filename: str, limit: int, revision: str) -> bytes:
        """The whole of a small file on a branch, by one request; of one longer than `limit`, `limit + 1` bytes.

        For display only, never for records: the commit is not known.
        """
        url = f"{self.endpoint}/{quote(repo)}/resolve/{quote(revision, safe='')}/{quote(filename)}"
        return self.get(url, repo, lambda r: whole_file(r, limit))

    def read_file(self, repo: str, filename: str, commit: str, limit: int) -> bytes:
        """The whole of a small file. Of one longer than `limit`, `limit + 1` bytes, so that the caller can tell."""
        return self.get(self._url(repo, filename, commit), repo, lambda r: whole_file(r, limit, commit))

    def read_range(self, repo: str, filename: str, commit: str, begin: int, end: int) -> Part:
        """Bytes `begin` to `end` (exclusive) of a file, fewer if it ends before, and its size.

        A server that ignores the range is not read past `end`.
        """
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        return self.get(
            self._url(repo, filename, commit),
            repo,
            lambda r: file_range(r, begin, end, commit),
            headers,
            allowed=(200, 206, 416),
        )

    def file_facts(self, repo: str, filename: str, commit: str) -> FileFacts:
        """Content hash and size of a file, without reading it."""
        from huggingface_hub import get_hf_file_metadata

        def ask(_: "httpx2.Client") -> FileFacts:
            facts = get_hf_file_metadata(self._url(repo, filename, commit), endpoint=self.endpoint)
            if facts.commit_hash is None or facts.etag is None:
                raise Unfit("the answer does not come from a Hub")
            return FileFacts(facts.etag, facts.size or 0)

        return self.attempts(repo, ask)

    def download(self, repo: str, filename: str, commit: str) -> Path:
        """A file in the Hub client's cache, downloaded if missing, its bytes checked against the Hub's hash.

        Bytes that do not match are removed from the cache and fetched once more. Raises NetworkError if they still
        do not match, OutputError if the disk is full, and the errors of every request.
        """
        from huggingface_hub import hf_hub_download

        for again in (False, True):

            def fetch(_: "httpx2.Client", force: bool = again) -> Path:
                return Path(
                    hf_hub_download(
                        repo,
                        filename,
                        revision=commit,
                        cache_dir=cache_folder(),
                        endpoint=self.endpoint,
                        force_download=force,
                        **identity(),
                    )
                )

            path = self.attempts(repo, fetch)
            # The cache names a blob by its hash, so no request is needed; without links, ask the Hub for the hash.
            linked = path.readlink().name if path.is_symlink() else ""
            oid = linked if _OID.fullmatch(linked) else self.file_facts(repo, filename, commit).oid
            if not _OID.fullmatch(oid):
                raise NetworkError(f"{repo}/{filename}: the Hub does not tell its hash", hint="check HF_ENDPOINT")
            if content_oid(path, sha1=len(oid) == 40) == oid:
                return path
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise NetworkError(f"{repo}/{filename}: the bytes received do not match the Hub's hash", hint="rerun later")

    def _url(self, repo: str, filename: str, commit: str) -> str:
        from huggingface_hub import hf_hub_url

        if not is_commit(commit):
            raise ValueError(f"not pinned to a commit: {commit!r}")
        try:
            return hf_hub_url(repo, filename, revision=commit, endpoint=self.endpoint)
        except Exception as error:
            raise_translated(error, repo)

    def _page(self, url: str, what: str) -> tuple[list[Listed], str]:
        """The repositories of one page of the listing, and the address of the next one."""
        sizes = iter(_PAGE_SIZES)

        def read(response: "httpx2.Response") -> tuple[list[Listed], str]:
            return [found for item in json_list(response) if (found := listed(item))], next_page(response)

        return self.get(lambda: with_limit(url, next(sizes, _PAGE_SIZES[-1])), what, read)
