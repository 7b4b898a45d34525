"""One adapter merged for the first time: nothing is derived twice, and the way through the rooms stays short."""

import os
from pathlib import Path

import pytest
from huggingface_hub import close_session

from lora_cli.formats.config import parse_config
from lora_cli.formats.header import _header_of
from lora_cli.formats.modules import locate_modules
from tests.cli import ok
from tests.trips import evaluation_of_a_folder, merge_from_the_hub


def test_an_adapter_from_the_hub_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", os.environ["HF_ENDPOINT"])
    for cached in (parse_config, _header_of, locate_modules):
        cached.cache_clear()
    trip = merge_from_the_hub(ok, tmp_path)
    close_session()
    assert trip.count("formats/config.py:parse_config") == 1
    # One of the bytes that the Hub sent for the listing, one of the file.
    assert trip.count("formats/header.py:parse_header") == 2
    # The weights as they came; then the weights and the configuration of the result.
    assert trip.count("hashes.py:_hashed") == 3
    # 33 of them are writes to the network, whose time is kept; 60 are Gram matrices that serve norms, sums and ranks.
    assert trip.handovers <= 760


@pytest.mark.slow
def test_an_example_is_encoded_once(tmp_path: Path) -> None:
    trip = evaluation_of_a_folder(ok, tmp_path, examples=100)
    assert trip.count("models/encode.py:_read") == 100
    assert trip.handovers <= 400
