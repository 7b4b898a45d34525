"""A folder of methods: names, help and knobs without importing, and mistakes that are named."""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.errors import UsageError
from lora_cli.methods import MethodFolder

FOLDER = MethodFolder("lora_cli.merge_methods", "merge method")


def test_knobs_are_read_from_the_signature() -> None:
    ties = FOLDER.get("ties")
    assert ties.kind == "elementwise"
    assert ties.knobs["density"].default == 0.2
    assert ties.knobs["density"].type is float
    assert ties.knobs["election"].choices == ("total", "frequency")
    checked = FOLDER.check("ties", {"density": 0.5})
    assert (checked["density"], checked["election"]) == (0.5, "total")


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("tie", {}, "unknown merge method 'tie'"),
        ("ties", {"density": 0.0}, "out of range: 0 < x <= 1"),
        ("ties", {"density": 1.01}, "out of range"),
        ("ties", {"density": float("nan")}, "out of range"),
        ("ties", {"election": "loud"}, "one of total, frequency"),
        ("linear", {"density": 0.2}, "takes no --density"),
    ],
)
def test_a_mistake_is_named(name: str, given: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FOLDER.check(name, given)


def test_listing_methods_imports_none_of_them() -> None:
    code = (
        "import sys\nfrom lora_cli.methods import MethodFolder\n"
        "assert MethodFolder('lora_cli.merge_methods', 'm').knobs\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_docstring_is_read_by_its_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "mean.py").write_text(
        '''@method("low-rank", weights="sum")
def mean(updates, weights):
    """One line.

    The formula is

        ΔW = Σ w_i ΔW_i

    where w_i: the weights.

    Weights: factors,
    as they are.

    Use: always.

    Source: Ann 2023, arXiv 2303.01234, after arXiv:2101.00001.
    """
'''
    )
    folder = MethodFolder("lora_cli.merge_methods", "merge method")
    folder.folder = tmp_path
    mean = folder.get("mean")
    assert mean.summary == "One line."
    assert mean.formula == "The formula is\n\n    ΔW = Σ w_i ΔW_i\n\nwhere w_i: the weights."
    assert [*mean.sections] == ["Weights", "Use", "Source"]
    assert mean.sections["Weights"] == "factors,\nas they are."
    assert (mean.weights, mean.arxiv) == ("sum", "2303.01234")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "must hold one function called broken"),
        ('def broken(updates, weights):\n    """Doc."""', "needs one @method"),
        ('@method("low-rank")\ndef broken(updates, weights):\n    pass', "and a docstring"),
        ('@method("low-rank")\ndef broken(u, w, *, k: int = 3):\n    """Doc."""', "must be annotated"),
        ('@method("low-rank")\ndef broken(u, w, *, k: Annotated[int, Knob("k")]):\n    """Doc."""', "needs a default"),
    ],
)
def test_a_method_file_that_breaks_the_rules_is_a_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    folder = MethodFolder("lora_cli.merge_methods", "merge method")
    (tmp_path / "broken.py").write_text(text)
    folder.folder = tmp_path
    with pytest.raises(TypeError, match=words):
        _ = folder.methods
