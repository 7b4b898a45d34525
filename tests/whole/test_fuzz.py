"""Any bytes in place of a stranger's file are taken or refused in one line: a search by chance; see tests/fuzz.py."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import READERS, judge

MARKS = (b'"', b"{", b"}", b"[", b"]", b",", b":")
PIECES = (*MARKS, b"-1", b"1e999", b"NaN", b"null", b"\xff", b"\0", b"\\ud800", b"9" * 30)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_takes_its_seeds(name: str) -> None:
    assert [judge(READERS[name], seed) for seed in READERS[name].seeds] == [True] * len(READERS[name].seeds)


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_changed_bytes_are_taken_or_refused(name: str, data: st.DataObject) -> None:
    text = bytearray(data.draw(st.sampled_from(READERS[name].seeds)))
    for _ in range(data.draw(st.integers(1, 5))):
        place, gone = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 3))
        text[place : place + gone] = data.draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=3)))
    judge(READERS[name], bytes(text))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("header", "card")])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_values_of_another_kind_are_taken_or_refused(name: str, data: st.DataObject) -> None:
    lines = []
    for line in data.draw(st.sampled_from(READERS[name].seeds)).splitlines():
        value = json.loads(line)
        holder = value[0] if isinstance(value, list) else value
        while isinstance(holder, dict) and holder:
            key = data.draw(st.sampled_from(sorted(holder)))
            if isinstance(holder[key], dict) and holder[key] and data.draw(st.booleans()):
                holder = holder[key]
                continue
            holder[key] = data.draw(VALUES)
            break
        lines.append(json.dumps(value))
    judge(READERS[name], "\n".join(lines).encode() + b"\n")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting_is_taken_or_refused(name: str, opening: bytes) -> None:
    judge(READERS[name], opening * 50_000 + b"\n")
