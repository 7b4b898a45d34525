"""What the Hub client's cache holds of some repositories, and how parts of it are deleted."""

import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lora_cli.hub.cache import cache_folder

_STILL_SECONDS = 3600.0
"""An unfinished download that has not grown for so long belongs to no living process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Something in the cache: a revision of a repository, or an unfinished download of it (`commit` is "").

    `bytes` is what its deletion alone frees: files that another revision has too are not counted. `used` is the time
    of its last use in seconds, as far as the file system tells. `reason` says why it can go, "" if it stays.
    """

    repo: str
    commit: str
    bytes: int
    used: float
    path: Path
    reason: str = ""


def holdings(repos: Collection[str]) -> list[Held]:
    """What the cache holds of these model repositories, by repository; nothing where there is no cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir(cache_folder())
    except CacheNotFound:
        return []
    found = []
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model" or repo.repo_id not in repos:
            continue
        for revision in sorted(repo.revisions, key=lambda one: one.commit_hash):
            others = {file.blob_path for one in repo.revisions if one is not revision for file in one.files}
            own = {file.blob_path: file.size_on_disk for file in revision.files if file.blob_path not in others}
            used = max((file.blob_last_accessed for file in revision.files), default=revision.last_modified)
            found.append(
                Held(
                    repo=repo.repo_id,
                    commit=revision.commit_hash,
                    bytes=sum(own.values()),
                    used=used,
                    path=revision.snapshot_path,
                )
            )
        found += _unfinished(repo.repo_id, repo.repo_path)
    return found


def _unfinished(repo: str, folder: Path) -> Iterator[Held]:
    for file in sorted((folder / "blobs").glob("*.incomplete")):
        with suppress(OSError):
            facts = file.lstat()
            yield Held(repo=repo, commit="", bytes=facts.st_size, used=facts.st_mtime, path=file)


def is_still(held: Held) -> bool:
    """Whether an unfinished download has not grown for an hour."""
    return time.time() - held.used > _STILL_SECONDS


def delete(chosen: Collection[Held]) -> int:
    """Delete these parts of the cache, and return the bytes freed. What another process deleted meanwhile is left out.

    The cache is scanned again for the files that other revisions share, which stay.
    """
    from huggingface_hub import scan_cache_dir

    if not chosen:
        return 0
    freed = 0
    cache = scan_cache_dir(cache_folder())
    for repo in cache.repos:
        there = {revision.commit_hash for revision in repo.revisions}
        commits = {held.commit for held in chosen if held.repo == repo.repo_id} & there
        if repo.repo_type == "model" and commits:
            # Of this repository alone: a copy of it may have the same commits.
            strategy = replace(cache, repos=frozenset([repo])).delete_revisions(*sorted(commits))
            strategy.execute()
            freed += strategy.expected_freed_size
    for held in chosen:
        if not held.commit and is_still(held):
            with suppress(OSError):
                held.path.unlink()
                freed += held.bytes
    return freed
