"""What a terminal shows of a stranger's text, and ids that read back from a line as they were."""

import unicodedata

import regex
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.escapes import as_line, id_in_line, safe

# Blank in every font, although Unicode does not call them ignorable.
_BLANK = "\u2800\U00013441\U00016fe4\U0001d159"


def test_every_code_point_that_shows_nothing_is_an_escape_and_no_other_is() -> None:
    # Planes 2 to 13 hold ideographs and nothing, planes 15 and 16 private characters.
    every = "".join(map(chr, [*range(0x20000), *range(0xE0000, 0xE1000), 0x2A6DF, 0xF0000, 0x10FFFF]))
    nothing = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{C}\p{Z}" + _BLANK + "--[ \t\n\r]]", regex.V1)
    hidden = "".join(nothing.findall(every))
    # Codepoints that are newer than Python's tables are escaped, whatever they are.
    newer = [char for char in every if char not in " \t\n\r" and unicodedata.category(char) == "Cn"]
    assert safe(hidden) == hidden.encode("unicode_escape").decode()
    assert safe("\t\n\r") == "\\x09\\x0a\\x0d"
    shown = "".join(sorted({*every} - {*hidden} - {*newer} - {*"\t\n\r"}))
    assert safe(shown) == shown


@given(st.text())
def test_an_escaped_text_holds_nothing_to_escape(text: str) -> None:
    assert safe(safe(text)) == safe(text)


_SIGNS = " \t\n\r\\\"'{}[]#=-@:/.,;%$`&|<>~*?\x00\x1b\x7f\x85\u2028\u202e\u3164\ufeffaéh_f0"
_HOSTILE = st.text(st.sampled_from(_SIGNS)) | st.text()


@given(_HOSTILE.filter(bool))
def test_every_id_reads_back_from_its_line(id: str) -> None:
    line = as_line(id)
    assert line.isprintable()
    assert id_in_line(f"{line}\n".strip().removeprefix("\ufeff")) == id
