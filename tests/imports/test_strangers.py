"""Files of strangers under the names of known programs: taken, or refused in one line, and nothing half-written."""

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import LoraError
from lora_cli.imports import Asked, find
from lora_cli.imports._written import Conversion, write
from lora_cli.steps.bases import look_here
from lora_cli.steps.convert.weights import weights_of_base
from tests.cli import refused
from tests.imports.kinds import SAMPLES, Sample, kohya
from tests.imports.test_imports import base_of, titled, written

ONE_EACH = {one.program: one for one in reversed([one for one in SAMPLES if not one.refused])}
ON_BASE = ("IA3", "OFT")
DTYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I8": 1, "I64": 8}
VALUES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3) | st.just({})


def attempt(place: Path, base: Path, out: Path) -> None:
    """Convert what is there. Any exception but a LoraError of one line comes out."""
    try:
        found = find(place)
        if found is not None:
            weights, rank = (
                (partial(weights_of_base, str(base)), 2) if found.place.peft_type in ON_BASE else (None, None)
            )
            here = base if base.is_dir() else None
            asked = Asked("acme/tiny", here, skeleton=look_here(str(base)), weights=weights)
            conversion = Conversion(foreign=found.open(asked), rank=rank)
            conversion.demand_low_rank()
            out.mkdir(exist_ok=True)
            write(conversion, out)
    except LoraError as error:
        if not error.message or "\n" in error.message:
            raise ValueError(f"a message that is not one line: {error.message!r}") from error


def tensors_of(data: bytes) -> dict[str, tuple[str, list[int]]]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: (one["dtype"], one["shape"]) for name, one in header.items() if name != "__metadata__"}


def made_of(tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> bytes:
    """A valid safetensors file of these tensors, whose numbers are all small."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = DTYPES[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def other_tensors(data: st.DataObject, before: bytes) -> bytes:
    """The file with one tensor gone, renamed, of another shape or of another precision."""
    tensors = tensors_of(before)
    name = data.draw(st.sampled_from(sorted(tensors)))
    dtype, shape = tensors.pop(name)
    way = data.draw(st.sampled_from(["gone", "renamed", "shape", "dtype", "sides"]))
    if way == "renamed":
        cut = data.draw(st.integers(0, len(name)))
        name = name[:cut] + data.draw(st.sampled_from(["", ".", "x", ".alpha", "weight"])) + name[cut + 1 :]
    elif way == "shape":
        shape = data.draw(st.lists(st.integers(0, 5), max_size=5))
    elif way == "sides":
        shape = shape[::-1]
    elif way == "dtype":
        dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    if way != "gone" and name:
        tensors[name] = dtype, shape
    metadata = data.draw(
        st.sampled_from([{}, {"lora_adapter_metadata": "[1"}, {"lora_adapter_metadata": '{"unet.r": {}}'}])
    )
    return made_of(tensors, metadata)


def other_config(data: st.DataObject, before: bytes) -> bytes:
    """The configuration with one value of another kind."""
    config = json.loads(before)
    holder = config
    while True:
        key = data.draw(st.sampled_from(sorted(holder)))
        if isinstance(holder[key], dict) and holder[key] and data.draw(st.booleans()):
            holder = holder[key]
            continue
        holder[key] = data.draw(VALUES)
        return json.dumps(config).encode()


def other_bytes(data: st.DataObject, before: bytes) -> bytes:
    """The file with some bytes of its first kilobyte changed, or cut off."""
    text = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(text), 1000)))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    return bytes(text[: data.draw(st.sampled_from([len(text), len(text) // 2, 8, 0]))])


@pytest.mark.parametrize("sample", titled([*ONE_EACH.values()]))
def test_changed_files_are_taken_or_refused(sample: Sample, tmp_path: Path) -> None:
    source, _ = written(sample, tmp_path / "theirs")
    folder = tmp_path / "theirs"
    files = {file.name: file.read_bytes() for file in folder.iterdir()}

    @given(data=st.data())
    @settings(max_examples=40, deadline=None, database=None)
    def search(data: st.DataObject) -> None:
        for name, text in files.items():
            (folder / name).write_bytes(text)
        name = data.draw(st.sampled_from(sorted(files)))
        ways: list[Callable[[st.DataObject, bytes], bytes]] = [other_bytes]
        ways += [other_tensors] * 3 if name.endswith(".safetensors") else []
        ways += [other_config] * 3 if name.endswith(".json") else []
        (folder / name).write_bytes(data.draw(st.sampled_from(ways))(data, files[name]))
        attempt(source, tmp_path / "base", tmp_path / "out")

    search()


@pytest.mark.parametrize("sample", titled([*ONE_EACH.values()]))
def test_a_file_that_is_cut_off_is_refused(sample: Sample, tmp_path: Path) -> None:
    source, _ = written(sample, tmp_path / "theirs")
    weights = max((tmp_path / "theirs").iterdir(), key=lambda file: file.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-7])
    said = refused(5, "convert", str(source), "-o", "out", "--base", base_of(tmp_path))
    assert "truncated" in said or "no adapter" in said
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter.safetensors", "adapter.gguf", "x.safetensors"])
def test_text_under_a_known_name_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("no weights at all, but a text that is longer than a header")
    for place in (tmp_path, tmp_path / name):
        said = refused(5, "convert", str(place), "-o", "out")
        assert "not a" in said or "no adapter" in said or "not of PEFT" in said, said
    assert not Path("out").exists()


def test_an_adapter_of_another_program_under_a_known_name_is_that_of_its_own(tmp_path: Path) -> None:
    kohya(tmp_path, name="adapters.safetensors")
    found = find(tmp_path)
    assert found is not None
    assert found.by.program == "an adapter of kohya"


def test_a_bomb_of_a_gguf_header_is_refused_at_once(tmp_path: Path) -> None:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    start = b"GGUF" + struct.pack("<I", 3)
    array = text(b"a") + struct.pack("<IIQ", 9, 8, 2**60)
    nested = text(b"a") + struct.pack("<IIQ", 9, 9, 2**60)
    for data in (
        start + struct.pack("<QQ", 2**60, 0),
        start + struct.pack("<QQ", 0, 2**60),
        start + struct.pack("<QQ", 0, 1) + array,
        start + struct.pack("<QQ", 0, 1) + nested,
        start + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**62),
        start + struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<I", 2**31),
        start + struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0),
    ):
        (tmp_path / "x.gguf").write_bytes(data)
        said = refused(5, "convert", str(tmp_path / "x.gguf"))
        assert "malformed" in said or "truncated" in said
