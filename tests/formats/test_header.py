"""A stranger's safetensors header: whatever the safetensors library rejects is rejected, and only by HeaderError."""

import json
import math
import re
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from lora_cli.errors import HeaderError
from lora_cli.formats.header import (
    Header,
    header_length,
    parse_header,
    read_header,
)
from lora_cli.precision import BITS
from tests.clock import least_cpu
from tests.hostile.corpus import MODULE, good_weights, header_bombs, malformed_headers, safetensors, tensor

HEADERS = malformed_headers()
BOMBS = header_bombs()
# The library reads these (it keeps the last of two names, and allows long, odd or surplus things); we do not.
STRICTER = {
    "length of 9 MB",
    "entry is a list",
    "entry with another key",
    "name given twice",
    "name with a line break",
    "fifty dimensions",
    "overlapping tensors",
    "leading space",
}


def of(file: bytes) -> Header:
    return parse_header(file, len(file))


@pytest.mark.parametrize("what", HEADERS)
def test_a_malformed_header_is_refused(what: str) -> None:
    with pytest.raises(HeaderError):
        of(HEADERS[what])


@pytest.mark.parametrize("what", sorted(set(HEADERS) - STRICTER))
def test_the_library_refuses_it_too(what: str) -> None:
    with pytest.raises(SafetensorError):
        deserialize(HEADERS[what])


def test_a_truncated_file_says_how_much_is_there() -> None:
    file = good_weights()
    with pytest.raises(HeaderError, match=f"truncated: header says {len(file)} bytes, file has {len(file) - 5}"):
        of(file[:-5])


def test_a_git_lfs_pointer_is_named_as_one() -> None:
    with pytest.raises(HeaderError, match="weights are a Git LFS pointer"):
        of(HEADERS["Git LFS pointer"])


def test_a_good_header_gives_names_types_shapes_and_places(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(good_weights(rank=2, width=3, out=4))

    header = read_header(path)

    a = header.tensors[f"{MODULE}.lora_A.weight"]
    assert (a.dtype, a.shape, a.end - a.begin) == ("F32", (2, 3), 24)
    b = header.tensors[f"{MODULE}.lora_B.weight"]
    assert (b.begin, b.end) == (a.end, header.file_size)
    assert path.read_bytes()[a.begin : a.end] == struct.pack("<f", 1.0) * 6


def test_the_head_of_the_file_is_enough_but_half_of_it_is_not() -> None:
    file = good_weights()
    length = header_length(file[:8], len(file))
    head = parse_header(file[: 8 + length], len(file))
    assert (head.tensors, head.file_size, head.metadata) == (of(file).tensors, len(file), of(file).metadata)
    with pytest.raises(HeaderError, match="incomplete"):
        parse_header(file[: 7 + length], len(file))


@pytest.mark.slow
@pytest.mark.parametrize("what", BOMBS)
def test_a_large_header_is_judged_within_2_seconds_and_64_megabytes(what: str) -> None:
    def tensors() -> int:
        try:
            return len(of(BOMBS[what]).tensors)
        except HeaderError:
            return 0

    assert least_cpu(tensors, 2.0) < 2

    # Tracing slows a parse of many tensors fivefold, hence a run of its own for the memory.
    tracemalloc.start()
    try:
        assert tensors() == (50_000 if what == "as many tensors as may be" else 0)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 64e6


# Types of elements -------------------------------------------------------------------------------------------------


def library_reads(file: bytes) -> bool:
    try:
        deserialize(file)
    except SafetensorError:
        return False
    return True


def test_the_types_are_those_that_the_library_names() -> None:
    with pytest.raises(SafetensorError) as refusal:
        deserialize(safetensors({"a": tensor("F31")}, b"\0" * 4))
    named = set(re.findall("`([A-Z0-9_]+)`", str(refusal.value))) - {"F31"}
    assert len(named) > 20
    assert named == set(BITS)


@pytest.mark.parametrize("dtype", BITS)
def test_every_type_fills_as_many_bytes_as_in_the_library(dtype: str) -> None:
    for count in range(9):
        for size in range(0, 8 * count + 2):
            file = safetensors({"a": tensor(dtype, [count], [0, size])}, b"\0" * size)
            try:
                mine = bool(of(file).tensors)
            except HeaderError:
                mine = False
            assert mine == library_reads(file), (count, size)


# Never accept what the library rejects -----------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-2, 9), st.sampled_from([0, 4, 8, 2**32, 2**53, 2**63, 2**64]), st.floats(), st.booleans()
)
scalars = st.one_of(st.none(), numbers, st.text(max_size=3), st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "C64"]))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(
            st.sampled_from(["F32", "F16", "U8", "BOOL", "C64", "F4", "F6_E2M3", "F8_E8M0", "F32 "]), values
        ),
        "shape": st.one_of(st.lists(st.integers(0, 3), max_size=3), st.lists(numbers, max_size=3), values),
        "data_offsets": st.one_of(st.lists(st.integers(0, 12), min_size=2, max_size=2), st.lists(numbers), values),
    }
)
objects = st.dictionaries(
    st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=3)), st.one_of(entries, values), max_size=3
)


def agrees_with_the_library(file: bytes) -> None:
    try:
        header = of(file)
    except HeaderError:
        return
    names = {name for name, _ in deserialize(file)}
    assert names == set(header.tensors)


@given(header=objects, body=st.binary(max_size=16))
@settings(max_examples=400, deadline=None)
def test_any_json_header_is_judged_as_the_library_judges_it(header: dict[str, object], body: bytes) -> None:
    agrees_with_the_library(safetensors(header, body))


@st.composite
def valid_files(draw: st.DrawFn, names: st.SearchStrategy[str]) -> bytes:
    header: dict[str, object] = {}
    at = 0
    for name in draw(st.lists(names, unique=True, max_size=4)):
        dtype, width = draw(st.sampled_from([("F32", 32), ("BF16", 16), ("F8_E8M0", 8), ("C64", 64), ("F4", 4)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        if dtype == "F4":
            shape.append(2)
        size = width * math.prod(shape) // 8
        header[name] = tensor(dtype, shape, [at, at + size])
        at += size
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    text = json.dumps(header, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    return safetensors(text.encode(errors="replace") + b" " * draw(st.integers(0, 8)), b"\0" * at)


@given(file=valid_files(st.text("abz._é0", max_size=4)))
@settings(max_examples=100, deadline=None)
def test_a_valid_file_is_read_as_the_library_reads_it(file: bytes) -> None:
    found = {name: (entry.dtype, list(entry.shape)) for name, entry in of(file).tensors.items()}
    assert found == {name: (told["dtype"], told["shape"]) for name, told in deserialize(file)}


@given(file=valid_files(st.text(max_size=4)), data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_valid_file_and_the_same_file_with_bytes_changed(file: bytes, data: st.DataObject) -> None:
    agrees_with_the_library(file)
    changed = bytearray(file)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(file) - 1))
        changed[place] = data.draw(st.one_of(st.sampled_from(b'"{}[],:0-\\ \n'), st.integers(0, 255)))
    agrees_with_the_library(bytes(changed))
    agrees_with_the_library(file[: data.draw(st.integers(0, len(file)))])


@given(file=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_judged_as_the_library_judges_them(file: bytes) -> None:
    agrees_with_the_library(file)
    agrees_with_the_library(struct.pack("<Q", len(file)) + file)
