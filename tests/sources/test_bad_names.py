"""Names that a repository chooses never become paths: not here, and not on Windows either."""

import os
from pathlib import Path, PureWindowsPath

from tests.cli import lora, ok
from tests.fake_hub import BASE, FakeHub, lora_files

CONFIG = "adapter_config.json"
FOLDERS = (
    "..", "../..", "../../..", "/etc", "//server/share", "C:", "C:/Users", "c:temp", r"..\..", r"\\server\share",
    r"a\..\b", "a/../..", "./..", "a//b", "~", "~/x", "$HOME", "%USERPROFILE%", "a\0b", "a\nb", "con", "aux", "nul.txt",
    "lpt1/x", "a:stream", "trailing.", "trailing ", ".git", "-rf", "a b",
)  # fmt: skip


def tree(folder: Path, cache: Path) -> set[Path]:
    """Every path below a folder but those of the cache and of the test's own home, where the catalogue is."""
    own = (cache, Path(os.environ["HOME"]))
    return {path for path in folder.rglob("*") if not any(path.is_relative_to(place) for place in own)}


def test_no_name_of_a_repository_becomes_a_path(fake: FakeHub, tmp_path: Path) -> None:
    assert len(set(FOLDERS)) == 30
    good = {f"fine/{name}": data for name, data in lora_files().items()}
    for number, folder in enumerate(FOLDERS):
        files = {f"{folder}/{name}": data for name, data in lora_files().items()}
        fake.add(f"alice/trap-{number}", files | good)
    cache = Path(os.environ["HF_HOME"])
    before = tree(tmp_path.parent, cache)
    ok("pool", "sync", BASE)
    ids = ok("pool", "list", "-q", "-n", "100").out.splitlines()
    lora("pool", "fetch", *ids)
    assert tree(tmp_path.parent, cache) == before
    assert {f"alice/trap-{number}:fine" for number in range(len(FOLDERS))} <= set(ids)
    for path in cache.rglob("*"):
        named = PureWindowsPath(path.relative_to(cache))
        assert named.stem.lower() not in ("con", "aux", "nul", "lpt1"), path
        assert named.name.rstrip(". ") == named.name, path
        assert not named.drive, path
        assert "\\" not in str(path), path
        assert ".." not in named.parts, path
