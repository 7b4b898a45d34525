"""Questions to the Hugging Face Hub: list adapters, read parts of files, download one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlencode

from lora_cli.errors import NetworkError, NothingMatched
from lora_cli.hub.bodies import Part, collect, collect_range, json_page, text
from lora_cli.hub.cache import cache_folder, content_oid
from lora_cli.hub.connection import Connection, identity
from lora_cli.hub.listing import EXPAND, Listed, listed, with_limit
from lora_cli.hub.problems import Gated, Overloaded, raise_translated
from lora_cli.names import is_commit

if TYPE_CHECKING:
    import httpx2

_PAGE_SIZES = (1000, 200, 40)  # ask again for smaller pages if the Hub times out
_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class FileFacts(NamedTuple):
    """The Hub's facts about a file: `oid` is its SHA-256 (64 hex digits), or outside LFS a git blob's SHA-1 (40)."""

    oid: str
    size: int


class Hub(Connection):
    """The questions that this tool asks a Hub, each one request unless it says otherwise."""

    def list_adapters(self, base: str, *, since: str = "", limit: int | None = None) -> Iterator[list[Listed]]:
        """The repositories tagged as PEFT adapters of `base`, newest first, one page at a time.

        A repeated repository is yielded once; a page that may cut the listing short raises.

        Args:
            base: the base model's Hub id.
            since: skip (and do not request) repositories created before this ISO time.
            limit: the most repositories to list.
        """
        query: list[tuple[str, Any]] = [("filter", f"base_model:adapter:{base}"), ("filter", "peft")]
        query += [("sort", "createdAt"), *(("expand", name) for name in EXPAND)]
        query.append(("limit", min(limit or _PAGE_SIZES[0], _PAGE_SIZES[0])))
        url = f"{self.endpoint}/api/models?{urlencode(query)}"
        asked: set[str] = set()
        seen: set[str] = set()
        while url:
            if url in asked:
                raise NetworkError(f"the listing of {base} goes round in circles", hint="rerun later")
            asked.add(url)
            items, url = self._page(url, f"the listing of {base}")
            page = []
            for item in map(listed, items):
                if item is None or item.hub_id in seen:
                    continue
                if since and item.created_at and item.created_at < since:
                    url = ""
                    break
                seen.add(item.hub_id)
                page.append(item)
                if limit is not None and len(seen) >= limit:
                    url = ""
                    break
            yield page

    def repository(self, repo: str, revision: str = "") -> Listed:
        """The listing's entry for one repository at a branch, tag or whole commit, "" for its main branch."""
        at = f"/revision/{quote(revision, safe='')}" if revision else ""
        query = urlencode([("expand", name) for name in EXPAND])
        item, _ = self.get(f"{self.endpoint}/api/models/{repo}{at}?{query}", repo, json_page)
        found = listed(item)
        if found is None or (is_commit(revision) and found.commit != revision):
            raise NetworkError(
                f"{repo}: the Hub answered with another repository or revision", hint="check HF_ENDPOINT"
            )
        return found

    def exists(self, repo: str) -> bool:
        """False if the repository does not exist on the Hub (any more)."""
        try:
            self.get(f"{self.endpoint}/api/models/{repo}?expand=sha", repo, text)
        except Gated:
            return True
        except NothingMatched:
            return False
        return True

    def read_newest(self, repo: str, filename: str, limit: int, revision: str) -> bytes:
        """The whole of a small file on a branch, by one request; of one longer than `limit`, `limit + 1` bytes.

        For display only, never for records: the commit is not known.
        """
        url = f"{self.endpoint}/{quote(repo)}/resolve/{quote(revision, safe='')}/{quote(filename)}"
        return self.get(url, repo, lambda r: collect(r, limit + 1))

    def read_file(self, repo: str, filename: str, commit: str, limit: int) -> bytes:
        """The whole of a small file. Of one longer than `limit`, `limit + 1` bytes, so that the caller can tell."""
        return self.get(self._url(repo, filename, commit), repo, lambda r: collect(r, limit + 1))

    def read_range(self, repo: str, filename: str, commit: str, begin: int, end: int) -> Part:
        """Bytes `begin` to `end` (exclusive) of a file, fewer if it ends before, and its size.

        A server that ignores the range is not read past `end`.
        """
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        return self.get(
            self._url(repo, filename, commit), repo, lambda r: collect_range(r, begin, end), headers, allowed=(416,)
        )

    def file_facts(self, repo: str, filename: str, commit: str) -> FileFacts:
        """Content hash and size of a file, without reading it."""
        from huggingface_hub import get_hf_file_metadata

        def ask(_: "httpx2.Client") -> FileFacts:
            facts = get_hf_file_metadata(self._url(repo, filename, commit), endpoint=self.endpoint)
            return FileFacts(facts.etag or "", facts.size or 0)

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
            if not _OID.fullmatch(oid) or content_oid(path, sha1=len(oid) == 40) == oid:
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

    def _page(self, url: str, what: str) -> tuple[list[Any], str]:
        for size in _PAGE_SIZES:
            try:
                items, following = self.get(with_limit(url, size), what, json_page)
                break
            except Overloaded:
                if size == _PAGE_SIZES[-1] or self.stopped:
                    raise
        if not isinstance(items, list):
            raise NetworkError(f"{what}: the Hub's answer is not a list", hint="check HF_ENDPOINT")
        return items, following
