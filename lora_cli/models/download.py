"""A base model's files, downloaded into the Hub client's cache."""

from collections.abc import Callable
from pathlib import Path

from lora_cli.errors import NothingMatched
from lora_cli.formats.base_files import CONFIG
from lora_cli.formats.base_names import MAIN
from lora_cli.formats.checkpoint import INDEX, WEIGHTS, HubModel, cached_model, or_a_folder_like, wanted_files
from lora_cli.hub.cache import cached_file
from lora_cli.hub.client import Hub
from lora_cli.records import Progress, silent
from lora_cli.text import counted, size

_LOG_IN = "check the id; for a private one log in with 'hf auth login'"


def copy_of(model: HubModel) -> Path:
    """The folder in the Hub client's cache that has the name of the model's commit: of the copy that is here if it is
    complete, else of the revision's configuration, which is downloaded.
    """
    if cached := cached_model(*model):
        return cached
    with or_a_folder_like(model.repo):
        hub = Hub()
        if not hub.exists(model.repo):
            raise NothingMatched(f"no base model {model.repo}", hint=_LOG_IN)
        # Download by branch name, so that the cache records which commit the branch points to.
        return hub.download(model.repo, CONFIG, model.revision).parent


def download_base(
    hub: Hub,
    repo: str,
    revision: str = MAIN,
    *,
    weights: bool = True,
    announce: Callable[[str], object] = str,
    progress: Progress = silent,
) -> Path:
    """Download a model, with its `weights` or without, into the Hub client's cache; its folder there, which has the
    name of the commit. `announce` is called with a line about the download before it starts.
    """
    # Download by branch name, so that the cache records the branch's commit and a later run needs no network.
    commit = hub.download(repo, CONFIG, revision).parent.name
    listed = hub.repository(repo, commit).files
    split = INDEX in listed and WEIGHTS not in listed
    files = wanted_files(listed, hub.download(repo, INDEX, commit) if split else None, repo)
    missing = [
        file
        for file in files
        if cached_file(repo, file, commit) is None and (weights or not file.endswith(".safetensors"))
    ]
    total = sum(hub.file_facts(repo, file, commit).size for file in missing)
    announce(f"fetching the base {repo}, {counted(len(missing), 'file')}, {size(total)}")
    for done, file in enumerate(missing):
        progress("fetching the base", done, len(missing))
        hub.download(repo, file, commit)
    progress("fetching the base", len(missing), len(missing))
    config = cached_file(repo, CONFIG, commit)
    assert config is not None
    return config.parent
