"""`lora methods`: every method in the list, one of them explained, for people and for scripts."""

import csv
import html
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from lora_cli.commands.methods import CLASSES, METHODS, by_class, class_of, facts_of, page
from lora_cli.methods import MethodFolder
from lora_cli.recipes import FIT_METHODS
from tests import generate
from tests.cli import ok, refused


def test_the_list_has_every_method_with_its_class_weights_paper_and_first_line() -> None:
    rows = {line.split("\t")[0]: line.split("\t") for line in ok("methods").out.splitlines()}
    assert [*rows][: len(METHODS.methods)] == [one.name for one in by_class(METHODS)]
    assert [*rows][len(METHODS.methods) :] == [f"fit:{name}" for name in FIT_METHODS.methods]
    assert rows["linear"] == [
        "linear",
        "exact low rank",
        "Weighted sum of the updates, reduced to the requested rank.",
        "average",
        "2212.04089",
    ]
    assert rows["cat"][1::2] == ["exact low rank", "average"]
    assert rows["ties"][1] == "elementwise"
    assert rows["peft-ties"][1::2] == ["A and B apart", "sum"]
    assert rows["fit:lorahub"][1:] == ["preset of fit", FIT_METHODS.get("lorahub").summary, "-", "2307.13269"]


def test_the_list_goes_from_the_simplest_class_to_what_is_there_for_comparison() -> None:
    classes = [line.split("\t")[1] for line in ok("methods").out.splitlines()]
    places = [[*CLASSES, "preset of fit"].index(name) for name in classes]
    assert places == sorted(places)


def test_the_list_has_the_same_rows_in_every_format() -> None:
    document = json.loads(ok("methods", "--json").out)
    assert document["schema"] == "lora.methods/1"
    rows = document["rows"]
    assert [json.loads(line) for line in ok("methods", "--jsonl").out.splitlines()] == rows
    assert [row["method"] for row in csv.DictReader(io.StringIO(ok("methods", "--csv").out))] == [
        row["method"] for row in rows
    ]
    assert ok("methods", "-q").out.split() == [row["method"] for row in rows]
    assert {row["method"] for row in rows if row["needs"]} <= {"regmean"}


@pytest.mark.parametrize("name", sorted(METHODS.methods))
def test_every_method_is_explained_within_80_columns(name: str) -> None:
    one, text = METHODS.get(name), ok("methods", name).out
    assert text.startswith(f"{name} · {class_of(one)} · weights {one.weights} ")
    assert max(len(line) for line in text.splitlines()) <= 80
    told = " ".join(text.split())
    labelled = [f"{label} {words}" for label, words in one.sections.items()]
    for words in (one.summary, one.formula, *labelled, *(knob.help for knob in one.knobs.values())):
        assert " ".join(words.split()) in told


@pytest.mark.parametrize("name", sorted(FIT_METHODS.methods))
def test_every_preset_is_explained_within_80_columns(name: str) -> None:
    one, text = FIT_METHODS.get(name), ok("methods", f"fit:{name}").out
    way = {"gradient": "gradient descent", "search": "search without gradients", "routing": "routing, without learning"}
    assert text.startswith(f"{name} · preset of fit · by {way[one.kind]}")
    assert max(len(line) for line in text.splitlines()) <= 80
    told = " ".join(text.split())
    for words in (one.summary, one.formula, one.sections["Source"], *(knob.help for knob in one.knobs.values())):
        assert " ".join(words.split()) in told


def test_a_name_of_a_preset_alone_needs_no_prefix_and_one_of_both_names_the_other_page() -> None:
    assert ok("methods", "adamerging").out == ok("methods", "fit:adamerging").out
    both = ok("methods", "cat").out
    assert both.startswith("cat · exact low rank")
    assert both.endswith("lora methods fit:cat explains the preset of the same name.\n")
    assert ok("methods", "fit:cat").out.startswith("cat · preset of fit")
    document = json.loads(ok("methods", "adamerging", "--json").out)
    assert (document["method"], document["class"], document["arxiv"]) == (
        "fit:adamerging",
        "preset of fit",
        "2310.02575",
    )
    assert [option["option"] for option in document["options"]] == ["--objective", "--granularity", "--checkpoint"]
    assert "did you mean 'lorahub'?" in refused(2, "methods", "lorahubs")
    assert "unknown preset 'ties'" in refused(2, "methods", "fit:ties")


def test_the_options_of_a_method_are_told_with_defaults_and_ranges() -> None:
    text = ok("methods", "ties").out
    assert re.search(r"^  --density 0\.2 .*\(0 < x <= 1\)", text, flags=re.MULTILINE | re.DOTALL)
    assert re.search(r"^  --election total .*\(total,\s+frequency\)", text, flags=re.MULTILINE)
    options = {row["option"]: row for row in json.loads(ok("methods", "ties", "--json").out)["options"]}
    assert options["--density"]["type"] == "float"
    assert (options["--density"]["default"], options["--density"]["allowed"]) == (0.2, "0 < x <= 1")
    assert options["--election"]["allowed"] == "total, frequency"


def test_one_method_is_one_document_for_scripts() -> None:
    document = json.loads(ok("methods", "peft-ties", "--json").out)
    assert document["schema"] == "lora.methods.one/1"
    assert (document["method"], document["class"], document["weights"]) == ("peft-ties", "A and B apart", "sum")
    assert document["sections"].keys() == {"weights", "cost", "use", "source"}
    assert document["formula"].startswith("With X_i one of A_i")
    assert ok("methods", "peft-ties", "-q").out == "peft-ties\n"


def test_a_method_that_runs_others_inside_names_their_options(tmp_path: Path) -> None:
    files = {
        "plain": '@method("low-rank")\ndef plain(u, w):\n    """Plain."""',
        "knobbed": '@method("low-rank")\ndef knobbed(u, *, k: Annotated[int, Knob("some", low=1)] = 3):\n    """K."""',
        "room": '@method("space", inside=("knobbed", "plain"))\ndef room(u, w, inside):\n    """Room."""',
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    folder = MethodFolder("lora_cli.merge_methods", "merge method")
    folder.folder = tmp_path
    text = page(folder.get("room"), folder)
    assert "--inside knobbed  method that merges in the space found (knobbed, plain)" in text
    assert "With --inside knobbed\n  --k 3  some (1 <= x)" in text
    assert "--inside plain" not in text
    facts = facts_of(folder.get("room"), folder)
    assert facts["class"] == "spectral"
    assert facts["inside"]["plain"] == []
    assert [row["option"] for row in facts["inside"]["knobbed"]] == ["--k"]


def test_the_page_in_the_docs_reads_as_the_docstrings() -> None:
    tags, shown = re.compile(r"<[^>]+>"), MarkdownIt().enable("table").render(generate.methods())
    told = " ".join(html.unescape(tags.sub("", shown)).split())
    for name, one in METHODS.methods.items():
        assert f"<h3>{name}</h3>" in shown
        labelled = [f"{label}: {text}" for label, text in one.sections.items()]
        for words in (one.summary, one.formula, *labelled, *(knob.help for knob in one.knobs.values())):
            assert " ".join(words.replace("`", "").split()) in told


def test_an_unknown_method_is_met_with_the_nearest_name() -> None:
    told = refused(2, "methods", "tise")
    assert "unknown method 'tise'" in told
    assert "did you mean 'ties'?" in told


@pytest.mark.parametrize("words", [[], ["ties"], ["lorahub"]])
def test_methods_are_told_of_without_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom lora_cli.app import app\n"
        f"try:\n    app(['methods', *{words!r}], prog_name='lora')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
