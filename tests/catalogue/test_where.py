"""The conditions of --where and the columns of --sort, on a real catalogue."""

import hashlib
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.where import COLUMNS, conditions, ordering
from lora_cli.errors import UsageError
from lora_cli.records import Adapter


def adapter(name: str, **facts: object) -> Adapter:
    return Adapter(id=name, commit="a" * 40, source="hub", repo=name, **facts)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalogue]:
    with Catalogue(tmp_path_factory.mktemp("where") / "catalogue.db") as opened:
        opened.add(
            [
                adapter("a/one", rank=4, licence="mit", downloads=10, target_modules=("q_proj", "v_proj"), norm=0.5),
                adapter("a/two", rank=16, licence="Apache-2.0", downloads=2500, rslora=True, bytes=40_000_000),
                adapter("b/three", rank=64, author="bob", downloads=0, created_at="2026-05-01T00:00:00.000Z"),
                adapter(
                    "b/100%_sure", rank=None, status="unusable", reason="NaN in q_proj", licence="it's, complicated"
                ),
            ]
        )
        yield opened


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (["rank<=16"], ["a/one", "a/two"]),
        (["rank > 4"], ["a/two", "b/three"]),
        (["rank=4,64"], ["a/one", "b/three"]),
        (["rank!=4"], ["a/two", "b/100%_sure", "b/three"]),
        (["rank=none"], ["b/100%_sure"]),
        (["rank!=none", "rank<64"], ["a/one", "a/two"]),
        (["licence=apache-2.0"], ["a/two"]),
        (["license=MIT,apache-2.0"], ["a/one", "a/two"]),
        (["downloads>=2.5k"], ["a/two"]),
        (["size>38MiB"], ["a/two"]),
        (["size>39MiB"], []),
        (["norm<1e0"], ["a/one"]),
        (["rslora=true"], ["a/two"]),
        (["rslora=no", "rank<5"], ["a/one"]),
        (["target_modules=Q_PROJ"], ["a/one"]),
        (["target~v_pro"], ["a/one"]),
        (["id~%"], ["b/100%_sure"]),
        (["id~_sure"], ["b/100%_sure"]),
        (["id!~a/"], ["b/100%_sure", "b/three"]),
        (["status!=ok"], ["b/100%_sure"]),
        (["reason~nan"], ["b/100%_sure"]),
        (["author=none"], ["a/one", "a/two", "b/100%_sure"]),
        (["created>=2026-04"], ["b/three"]),
        (["commit~aaa", "author==bob"], ["b/three"]),
    ],
)
def test_a_condition_finds_its_rows(catalogue: Catalogue, where: list[str], names: list[str]) -> None:
    assert [row.id for row in catalogue.find(where)] == names


@pytest.mark.parametrize(
    ("sort", "names"),
    [
        ("id", ["a/one", "a/two", "b/100%_sure", "b/three"]),
        ("-id", ["b/three", "b/100%_sure", "a/two", "a/one"]),
        ("-downloads", ["a/two", "a/one", "b/100%_sure", "b/three"]),
        ("rank", ["a/one", "a/two", "b/three", "b/100%_sure"]),
        ("-rank", ["b/three", "a/two", "a/one", "b/100%_sure"]),
        ("licence", ["a/two", "b/100%_sure", "a/one", "b/three"]),
        ("-created", ["b/three", "a/one", "a/two", "b/100%_sure"]),
    ],
)
def test_sorting_goes_up_with_a_minus_down_and_the_unknown_last(
    catalogue: Catalogue, sort: str, names: list[str]
) -> None:
    assert [row.id for row in catalogue.find(sort=sort)] == names


@pytest.mark.parametrize(
    ("where", "message", "hint"),
    [
        ("rank", "not a condition", "COLUMN OP VALUE"),
        ("", "not a condition", ""),
        ("rnak<4", "no column", "rank"),
        ("rank<many", "number", ""),
        ("rank~4", "for text", ""),
        ("rslora=maybe", "true or false", ""),
        ("rslora>1", "cannot be used with", ""),
        ("target_modules<3", "cannot be used with", ""),
        ("card~secret", "no column", ""),
        ("x" * 5000, "not a condition", ""),
    ],
)
def test_what_is_wrong_is_said(where: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        conditions([where])
    assert hint in caught.value.hint
    assert len(caught.value.message) < 1100


def test_an_unknown_column_to_sort_by() -> None:
    with pytest.raises(UsageError, match="no column"):
        ordering("id; drop table adapters")


PAYLOADS = [
    "'; DROP TABLE adapters; --", "1 OR 1=1", "' OR ''='", '" OR ""="', "x' UNION SELECT * FROM runs --", "\x00", "%",
    "_", "\\", "\\'", "); ATTACH DATABASE '/tmp/x' AS y; --", "' || load_extension('x') || '", "1) OR (1=1", "NULL",
    "?", "?1", ":id", "@x", "$x", "/*", "*/", "--", ";", "\n;\n", "\ud800", "💥" * 300, "CAST(1 AS TEXT)", "0x41",
]  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payloads_are_values_and_nothing_else(catalogue: Catalogue, payload: str) -> None:
    catalogue.close()
    before = hashlib.sha256(catalogue.path.read_bytes()).hexdigest()
    for text in (f"id={payload}", f"id~{payload}", f"id!={payload}", f"target_modules={payload}", f"licence<{payload}"):
        found = {row.id for row in catalogue.find([text])}
        assert found <= {"a/one", "a/two", "b/three", "b/100%_sure"}
    for text in (f"{payload}=1", f"rank={payload}", f"rank<{payload}", payload):
        try:
            catalogue.find([text])
        except UsageError:
            continue
    assert {row.id for row in catalogue.find([f"id={payload}"])} == set()
    catalogue.close()
    assert hashlib.sha256(catalogue.path.read_bytes()).hexdigest() == before


SQL_WORDS = {
    "AND", "OR", "IS", "NULL", "NOT", "LIKE", "ESCAPE", "COLLATE", "NOCASE", "EXISTS", "SELECT", "FROM", "json_each",
    "WHERE", "value", "coalesce",
}  # fmt: skip


@given(column=st.sampled_from(sorted(COLUMNS)), value=st.text(max_size=40))
def test_any_value_is_a_parameter_or_a_usage_error(column: str, value: str) -> None:
    for operator in ("=", "!=", "<", "~"):
        try:
            sql, values = conditions([f"{column}{operator}{value}"])
        except UsageError:
            continue
        assert sql.count("?") == len(values)
        without_literals = sql.replace("'\\'", "").replace("''", "").replace(f'"{column}"', "")
        assert set(re.findall(r"[^\s=!<>()?,01]+", without_literals)) <= SQL_WORDS
