"""Pictures: the same bytes for the same numbers, nothing of a stranger's id but its letters, whole or absent."""

import re
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest

from lora_cli.errors import LoraError, OutputError, Refused, UsageError
from lora_cli.plots.compare import ModulePair, draw_diff, draw_similarity
from lora_cli.plots.figure import Colours, colours_for
from lora_cli.plots.results import Losses, draw_fit, draw_scores
from lora_cli.plots.sequence import draw_sequence
from lora_cli.records import Coefficients, Score
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.steps.test_merge import SHAPES

HOSTILE = (
    "plain/adapter",
    "$\\frac{1}{0}$ and $x",
    "</text><script>x()</script>&amp;",
    "esc\x1b[31m\x07 and \x00",
    "bidi\u202egnp.exe\u2066",
    "中文/🙂 \ud800",
    "-->]]><!--",
    "x" * 5000,
)

Draw = Callable[[Path], None]


def similarity(file: Path, labels: tuple[str, ...] = HOSTILE) -> None:
    n = len(labels)
    matrix = [[1.0 if i == j else 0.9 if i + j == 1 else -0.05 * (i + j) / n for j in range(n)] for i in range(n)]
    draw_similarity(file, labels, matrix, [1, 1, *range(2, n)][:n], 7)


def diff(file: Path, names: tuple[str, str] = (HOSTILE[1], HOSTILE[2])) -> None:
    pairs = [
        ModulePair(
            module=f"model.layers.{layer}.{kind}",
            norms=(1.0 + layer, 0.0 if kind == "$x" else 2.0),
            cosine=None if kind == "$x" else 0.1 * layer,
            spectra=((3.0, 1.0, 0.5), () if kind == "$x" else (2.0,)),
        )
        for layer in range(3)
        for kind in ("q_proj", "$x")
    ]
    draw_diff(file, names, [*pairs, ModulePair(module="lm_head", norms=(0, 1), cosine=None, spectra=((), (1.0,)))])


LOSSES = Losses(
    points=[(0, None, 1.2), (10, 1.0, 0.9), (20, 0.8, 0.95)],
    best_step=10,
    others={"base": 1.2, "random-LoRA control": 0.94},
)


def coefficients(
    names: tuple[str, ...] = HOSTILE, *, layers: int = 2, granularity: str = "module", scale: float = 1.0
) -> Coefficients:
    """Coefficients of both signs, 0.1 apart; the first adapter lacks the first module."""
    values = {
        f"model.layers.{layer}.{kind}": tuple(
            (0.0 if (layer, kind, i) == (0, "attn.q", 0) else scale * (i - 3 + layer / 10),) for i in range(len(names))
        )
        for layer in range(layers)
        for kind in ("attn.q", "attn.k", "mlp.up")
    }
    return Coefficients(
        adapters=tuple(f"{name}@{'0' * 40}" for name in names),
        values=values,
        granularity=granularity,
        activation="linear",
        task_sha256="",
        base="acme/base",
    )


def fitted(file: Path) -> None:
    draw_fit(file, LOSSES, coefficients())


def score(system: str, value: float, *, delta: float | None = None, metric: str = "exact") -> Score:
    """A score; its difference to the baseline is `delta` ± 0.1, or it is the baseline's own."""
    differs = {} if delta is None else {"delta": delta, "delta_low": delta - 0.1, "delta_high": delta + 0.1}
    return Score(
        system=system,
        metric=metric,
        value=value,
        low=value - 0.1,
        high=value + 0.1,
        n=50,
        baseline="" if delta is None else "base",
        **differs,
    )


def scored(file: Path) -> None:
    draw_scores(file, [score("base", 0.3), *(score(name, 0.1, delta=-0.2) for name in HOSTILE)], "$\\frac.jsonl")


def learnt_in_sequence(file: Path) -> None:
    n = len(HOSTILE)
    grid = [[i / n if j <= i else 0.1 * j for j in range(n)] for i in range(n)]
    draw_sequence(file, HOSTILE, {"average": grid, HOSTILE[1]: grid, "ties": grid, "lego": grid}, "exact match")


PICTURES = [similarity, diff, fitted, scored, learnt_in_sequence]


@pytest.mark.slow
@pytest.mark.parametrize("draw", PICTURES)
@pytest.mark.parametrize("suffix", [".png", ".svg", ".SVG"])
def test_equal_numbers_give_equal_bytes(draw: Draw, suffix: str, tmp_path: Path) -> None:
    one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
    draw(one)
    with matplotlib.rc_context({"axes.facecolor": "red", "svg.hashsalt": None, "figure.dpi": 30}):
        draw(other)
    assert one.read_bytes() == other.read_bytes()
    assert one.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    draw(one)
    assert one.read_bytes() == other.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == [one.name, other.name]


@pytest.mark.parametrize("draw", PICTURES)
def test_an_id_is_text_and_no_more(draw: Draw, tmp_path: Path) -> None:
    draw(tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text("utf-8")
    root = ElementTree.fromstring(text)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert "script" not in tags
    assert not re.findall("[\x00-\x09\x0b-\x1f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text)
    words = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    assert any("$\\frac{1}{0}$ and $x" in word for word in words)
    assert any("<script>" in word for word in words)
    assert all(len(word) < 120 for word in words)
    assert "date" not in text.lower()


@pytest.mark.parametrize("n", [2, 13, 61, 200])
def test_labels_stand_where_they_can_be_read(n: int, tmp_path: Path) -> None:
    similarity(tmp_path / "x.svg", tuple(f"owner/adapter-{i}" for i in range(n)))
    text = (tmp_path / "x.svg").read_text("utf-8")
    assert ("owner/adapter-1<" in text) == (n <= 60)
    assert f"{n} adapters · 7 modules · 1 cluster of two or more" in text


def test_two_that_change_nothing_still_make_a_picture(tmp_path: Path) -> None:
    pair = ModulePair(module="model.layers.0.q_proj", norms=(0.0, 0.0), cosine=None, spectra=((), ()))
    draw_diff(tmp_path / "x.svg", ("a", "b"), [pair])
    assert "changes nothing" in (tmp_path / "x.svg").read_text("utf-8")


def alone(module: str) -> ModulePair:
    return ModulePair(module=module, norms=(1.0, 2.0), cosine=0.5, spectra=((1.0,), (2.0,)))


@pytest.mark.slow
@pytest.mark.parametrize("module", [f"layers.{'9' * 400}.q_proj", f"layers.0.{'m' * 3000}", "layers.0.{}"])
def test_names_and_numbers_of_modules_do_not_stretch_a_picture(module: str, tmp_path: Path) -> None:
    draw_diff(tmp_path / "x.png", ("a", "b"), [alone(module.replace("{}", f"m{i}")) for i in range(300)])
    width, height = struct.unpack(">2I", (tmp_path / "x.png").read_bytes()[16:24])
    assert width <= 24 * 150
    assert height <= 16 * 150


def test_more_modules_than_any_model_has_are_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="2,000 kinds of modules in 2,000 layers: too many to draw"):
        draw_diff(tmp_path / "x.png", ("a", "b"), [alone(f"layers.{i}.m{i}") for i in range(2000)])
    assert not [*tmp_path.iterdir()]


def test_a_picture_is_never_written_through_a_link_or_in_part(tmp_path: Path) -> None:
    kept = tmp_path / "kept.png"
    kept.write_text("mine")
    (tmp_path / "link.png").symlink_to(kept)
    (tmp_path / "folder.png").mkdir()
    cases: list[tuple[str, type[LoraError]]] = [
        ("link.png", OutputError),
        ("folder.png", OutputError),
        ("kept.png/x.png", OutputError),
        ("x.pdf", UsageError),
        ("x", UsageError),
    ]
    for name, error in cases:
        with pytest.raises(error):
            similarity(tmp_path / name)
    assert kept.read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.png", "kept.png", "link.png"]
    similarity(tmp_path / "new" / "x.png")
    assert (tmp_path / "new" / "x.png").is_file()


def test_commands_draw_beside_their_rows(tmp_path: Path) -> None:
    one, other = (str(write_adapter(tmp_path / f"$a{i}", random_factors(SHAPES, 2, seed=i))) for i in (1, 2))
    told = ok("diff", one, other, "--plot", "diff.svg")
    assert "diff.svg" in told.err
    assert len(told.out.splitlines()) == len(SHAPES)
    ok("pool", "similarity", one, other, "--plot", "pool.png")
    assert Path("diff.svg").read_bytes().startswith(b"<?xml")
    assert Path("pool.png").read_bytes().startswith(b"\x89PNG")


def words_of(file: Path) -> list[str]:
    """Every text in an SVG."""
    root = ElementTree.fromstring(file.read_text("utf-8"))
    return ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]


def test_stacks_of_layers_with_the_same_modules_have_rows_of_their_own(tmp_path: Path) -> None:
    pairs = [
        ModulePair(
            module=f"{stack}.block.{layer}.q",
            norms=(1, 1),
            cosine=cosine,
            spectra=((3.0, 2.5), (4.0,)),
        )
        for stack, cosine in (("encoder", 1.0), ("decoder", -1.0))
        for layer in range(2)
    ]
    draw_diff(tmp_path / "x.svg", ("a", "b"), pairs)
    words = words_of(tmp_path / "x.svg")
    assert {"encoder 0", "encoder 1", "decoder 0", "decoder 1"} <= set(words)
    draw_diff(tmp_path / "one.svg", ("a", "b"), pairs[:2])
    assert {"0", "1"} <= set(words_of(tmp_path / "one.svg"))


def test_singular_values_within_one_decade_have_numbers_beside_them(tmp_path: Path) -> None:
    pair = ModulePair(module="layers.0.q", norms=(1, 1), cosine=0, spectra=((4.0, 3.5, 2.5), (4.0, 2.6)))
    draw_diff(tmp_path / "x.svg", ("a", "b"), [pair])
    assert {"3", "4"} <= set(words_of(tmp_path / "x.svg"))


def test_long_ids_keep_their_owners_and_ends(tmp_path: Path) -> None:
    ids = tuple(f"{owner}/llama-3.1-8b-instruct-lora-finance-assistant-v1" for owner in ("alice", "bob"))
    similarity(tmp_path / "x.svg", ids)
    assert {"alice/llama-…ra-finance-assistant-v1", "bob/llama-3.…ra-finance-assistant-v1"} <= set(
        words_of(tmp_path / "x.svg")
    )


def test_a_crowd_is_labelled_by_cluster(tmp_path: Path) -> None:
    n = 80
    matrix = [[1.0 if i == j else 0.0 for j in range(n)] for i in range(n)]
    draw_similarity(tmp_path / "x.svg", ["x/y"] * n, matrix, [1] * 40 + [2] * 39 + [3], 7)
    words = set(words_of(tmp_path / "x.svg"))
    assert {"1", "2", "cluster"} <= words
    assert "3" not in words


def test_colours_fit_their_values() -> None:
    assert colours_for([-0.02, 0.01, float("nan")]) == Colours("RdBu_r", -0.02, 0.02)
    assert colours_for([0.4, 0.9]) == Colours("viridis", 0.4, 0.9)
    assert colours_for([0.7, 0.7]) == Colours("viridis", 0.0, 0.7)
    assert colours_for([0.0]) == colours_for([]) == Colours("viridis", 0.0, 1.0)


@pytest.mark.parametrize("colours", [Colours("RdBu_r", -0.2, 0.2), Colours("viridis", 3.0, 4.0)])
def test_a_text_can_be_read_on_every_colour(colours: Colours) -> None:
    for step in range(101):
        value = colours.low + step / 100 * (colours.high - colours.low)
        rgb = matplotlib.colormaps[colours.map]((value - colours.low) / (colours.high - colours.low))[:3]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        contrast = 1.05 / (light + 0.05) if colours.ink(value) == "white" else (light + 0.05) / 0.05
        assert contrast > 4.5, value


def test_a_similarity_has_the_colours_of_its_own_range(tmp_path: Path) -> None:
    cosines = [[1.0, 0.02, -0.01], [0.02, 1.0, 0.0], [-0.01, 0.0, 1.0]]
    draw_similarity(tmp_path / "x.svg", ["a", "b", "c"], cosines, [1, 2, 3], 7)
    assert {"0.02", "0.015", "\u22120.015"} <= set(words_of(tmp_path / "x.svg"))
    assert "1.00" not in words_of(tmp_path / "x.svg")


def test_a_fit_shows_its_losses_and_its_coefficients(tmp_path: Path) -> None:
    draw_fit(tmp_path / "x.svg", LOSSES, coefficients(("one/a", "two/b")))
    words = words_of(tmp_path / "x.svg")
    assert {"training", "validation", "best: 0.900", "base: 1.200", "random-LoRA control: 0.940", "coefficient"} <= {
        *words
    }
    assert words.index("one/a") < words.index("two/b")
    assert {"0 attn.q", "1 mlp.up", "-2.90", "-1.90", "0.00"} <= set(words)
    assert "2 adapters, the largest coefficients first · 6 modules" in words


@pytest.mark.parametrize(
    ("granularity", "columns", "title"),
    [
        ("adapter", {"all modules"}, "1 part"),
        ("layer", {"0", "1", "layer"}, "2 layers"),
        ("sublayer", {"0 attn", "0 mlp", "1 attn", "1 mlp"}, "4 sublayers"),
    ],
)
def test_a_column_is_a_part_with_coefficients_of_its_own(
    granularity: str, columns: set[str], title: str, tmp_path: Path
) -> None:
    draw_fit(tmp_path / "x.svg", LOSSES, coefficients(("one/a", "two/b"), granularity=granularity))
    words = words_of(tmp_path / "x.svg")
    assert columns <= set(words)
    assert any(word.endswith(f"· {title}") for word in words)
    # The value of the adapter that lacks one module of the part.
    assert "-3.00" in words


def test_many_modules_are_named_once_below_their_layers(tmp_path: Path) -> None:
    names = tuple(f"owner/adapter-{i}" for i in range(3))
    draw_fit(tmp_path / "x.svg", LOSSES, coefficients(names, layers=32))
    words = words_of(tmp_path / "x.svg")
    assert {"0", "31", "layer, and in each from the left: q, k, up"} <= set(words)
    uneven = coefficients(names, layers=32)
    less = {module: rows for module, rows in uneven.values.items() if module != "model.layers.3.attn.k"}
    draw_fit(tmp_path / "x.svg", LOSSES, replace(uneven, values={**less, "lm_head": less["model.layers.0.attn.q"]}))
    assert {"31", "–", "layer"} <= set(words_of(tmp_path / "x.svg"))


def test_of_coefficients_per_rank_the_mean_is_shown(tmp_path: Path) -> None:
    many = {"layers.0.q": ((0.5, 0.7), ()), "layers.0.k": ((0.1, 0.3), (0.4,))}
    per_rank = replace(coefficients(("one/a", "two/b"), granularity="rank"), values=many)
    draw_fit(tmp_path / "x.svg", LOSSES, per_rank)
    words = words_of(tmp_path / "x.svg")
    assert {"0.60", "0.20", "0.40", "coefficient, the mean over ranks"} <= set(words)
    assert "nan" not in words


@pytest.mark.parametrize(("scale", "written"), [(1.0, True), (1e-4, False), (1e6, False)])
def test_numbers_that_do_not_fit_their_cells_are_left_to_the_colours(
    scale: float, written: bool, tmp_path: Path
) -> None:
    draw_fit(tmp_path / "x.svg", LOSSES, coefficients(("one/a",), scale=scale))
    assert ("-2.90" in words_of(tmp_path / "x.svg")) == written


@pytest.mark.slow
@pytest.mark.parametrize(("n", "layers"), [(200, 32), (500, 2)])
def test_every_adapter_of_a_fit_and_of_an_evaluation_has_a_label_up_to_some_hundreds(
    n: int, layers: int, tmp_path: Path
) -> None:
    names = tuple(f"owner/adapter-{i}" for i in range(n))
    draw_fit(tmp_path / "fit.svg", LOSSES, coefficients(names, layers=layers))
    draw_scores(
        tmp_path / "eval.svg", [score("base", 0.3), *(score(name, 0.1, delta=-0.2) for name in names)], "t.jsonl"
    )
    for file in ("fit.svg", "eval.svg"):
        assert len({*names} & {*words_of(tmp_path / file)}) == (n if n <= 400 else 0)


@pytest.mark.parametrize(("metric", "best"), [("exact", "high"), ("nll", "low")])
def test_scores_are_sorted_with_the_best_at_the_top_and_the_baseline_marked(
    metric: str, best: str, tmp_path: Path
) -> None:
    scores = [
        score("low", 0.1, delta=-0.2, metric=metric),
        score("base", 0.3, metric=metric),
        score("high", 0.35, delta=0.05, metric=metric),
    ]
    draw_scores(tmp_path / "x.svg", scores, "task.jsonl")
    words = words_of(tmp_path / "x.svg")
    assert sorted(("low", "base", "high"), key=words.index) == (
        ["high", "base", "low"] if best == "high" else ["low", "base", "high"]
    )
    assert {"baseline: base", "no measurable difference", "task.jsonl, n = 50", "0.350"} <= set(words)


def test_modules_outside_all_layers_have_a_row_of_their_own(tmp_path: Path) -> None:
    draw_diff(tmp_path / "x.svg", ("a", "b"), [alone("layers.0.q"), alone("lm_head")])
    assert "–" in words_of(tmp_path / "x.svg")


def test_a_plot_of_another_kind_is_refused_before_the_work() -> None:
    for words in (("diff", "a", "b"), ("pool", "similarity"), ("fit",), ("eval",)):
        assert "x.pdf: a plot is .png or .svg" in refused(2, *words, "--plot", "x.pdf")
