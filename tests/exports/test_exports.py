"""The laws that every server of `--for` obeys. A new one adds its row to `LAWS`, and its rules to tests/readers.py."""

import ast
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import pytest

import lora_cli
from lora_cli.errors import Refused
from lora_cli.exports import Server, server, servers
from lora_cli.merge_options import MergeOptions
from lora_cli.methods import file_names
from tests import readers
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.exports.test_readers import BASE, IN_ATTENTION, same
from tests.readers import READERS, Refuses
from tests.steps.test_merge import close, in_peft

BASE_MODEL = "acme/tiny"
ODD_NAMES = ("plain", "a b;$(touch pwned)'\"`id`", "lr=1e-4,bs=8", "-x", "{}")


@dataclass(frozen=True)
class Law:
    """A program: its name in messages and in tests/readers.py, how its command begins, and its limits."""

    program: str
    command: str
    one_rank: bool = False
    highest_rank: int | None = None
    needs: dict[str, set[str]] = field(default_factory=dict)
    """Kind of module → the kinds that are added beside it as zeros."""


LAWS = {
    "vllm": Law("vLLM", f"vllm serve {BASE_MODEL} --enable-lora", highest_rank=512),
    "sglang": Law(
        "SGLang",
        f"python -m sglang.launch_server --model-path {BASE_MODEL} --enable-lora",
        one_rank=True,
        needs={"q_proj": {"k_proj", "v_proj"}, "up_proj": {"gate_proj"}},
    ),
}


@pytest.fixture(params=LAWS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def target(name: str) -> Server:
    return server(name)


@pytest.fixture
def pool(own_home: Path) -> None:
    """An adapter of every module, and one of lower rank that has attention only."""
    write_adapter(own_home / "wide", random_factors(BASE, 8, seed=1), lora_alpha=16)
    write_adapter(own_home / "narrow", random_factors(IN_ATTENTION, 4, seed=2), lora_alpha=4)


def merged(*options: str) -> tuple[Path, str]:
    return Path("out"), ok("merge", "wide", "narrow", *options, "-o", "out", "--force").err


def is_right(program: str, folder: Path) -> bool:
    """Whether the program applies the result in `folder` as PEFT does."""
    try:
        return same(READERS[program](folder, BASE), readers.peft(folder))
    except Refuses:
        return False


def test_every_file_is_a_choice_of_for_and_has_a_row() -> None:
    kind, _ = MergeOptions.flags()["for_"]
    choices = [choice for part in get_args(kind) for choice in get_args(part)]
    assert set(LAWS) == set(file_names("lora_cli.exports", "Server")) == set(choices)
    assert f"<{'|'.join(choices)}>" in ok("merge", "--help").out


def test_the_choices_are_known_without_importing_a_program() -> None:
    code = (
        "import sys, lora_cli.merge_options\n"
        "assert not [name for name in sys.modules if name.startswith(('torch', 'lora_cli.exports', 'lora_cli.steps'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_its_own_file_knows_a_program_by_its_name() -> None:
    package = Path(lora_cli.__file__).parent
    files = [file for room in ("steps", "commands") for file in (package / room).rglob("*.py")]
    constants = {
        (file.name, node.value)
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert [(file, text) for file, text in constants if text in LAWS] == []


def test_a_program_is_named_with_the_version_of_its_rules(name: str, target: Server) -> None:
    assert target.title == f"{LAWS[name].program} {target.version}"
    assert target.version[0].isdecimal()
    assert target in servers()


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("scope", [[], ["modules=q_proj"], ["modules=k_proj,up_proj"], ["layers=1"]])
def test_what_is_made_for_a_program_is_applied_as_peft_applies_it(name: str, scope: list[str]) -> None:
    where = [word for condition in scope for word in ("--scope", condition)]
    folder, told = merged("--for", name, *where)
    assert is_right(LAWS[name].program, folder)
    close(in_peft([folder], [1.0]), readers.peft(folder), 1e-6)
    assert f"checked by the rules of {server(name).title}, not on a server" in told
    plain, _ = merged(*where)
    assert same(readers.peft(plain), readers.peft(folder)), "only zeros were added"


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("scope", ["modules=q_proj", "modules=o_proj", "modules=v_proj", "modules=*_proj"])
def test_a_result_that_was_not_made_for_a_program_names_it_if_it_reads_otherwise(name: str, scope: str) -> None:
    folder, told = merged("--scope", scope)
    assert (LAWS[name].program in told) == (not is_right(LAWS[name].program, folder))


@pytest.mark.usefixtures("pool")
def test_a_program_of_one_rank_is_named_for_ranks_that_differ_and_refuses_them(name: str, target: Server) -> None:
    law = LAWS[name]
    folder, told = merged("--energy", "0.8", "--compact")
    assert target.one_rank == law.one_rank == (law.program in told) == (not is_right(law.program, folder))
    if law.one_rank:
        said = refused(2, "merge", "wide", "narrow", "--compact", "--for", name)
        assert f"--compact cannot be combined with --for {name}" in said
    else:
        folder, _ = merged("--energy", "0.8", "--compact", "--for", name)
        assert is_right(law.program, folder)


def test_a_rank_over_the_limit_and_conv1d_are_refused_with_the_programs_name(name: str, target: Server) -> None:
    most = LAWS[name].highest_rank
    assert target.highest_rank == most
    target.demand_servable(conv1d=[], rank=most or 100_000)
    if most is not None:
        with pytest.raises(Refused, match=f"{LAWS[name].program} serves ranks up to {most}"):
            target.demand_servable(conv1d=[], rank=most + 1)
    with pytest.raises(Refused, match=f"{target.title} takes no LoRA on Conv1D modules, as x/y has"):
        target.demand_servable(conv1d=["x/y"], rank=1)


def test_zeros_have_the_shapes_of_the_base_and_are_all_that_is_missing(name: str, target: Server) -> None:
    for kind in {module.rpartition(".")[2] for module in BASE}:
        modules = [module for module in BASE if module.endswith(kind)]
        zeros = target.zeros(modules, BASE)
        assert zeros == {module: BASE[module] for module in zeros}
        if kind in LAWS[name].needs:
            assert {module.rpartition(".")[2] for module in zeros} == LAWS[name].needs[kind]
        assert target.zeros([*modules, *zeros], BASE) == {}
        assert target.misread([*modules, *zeros], BASE) == ""
    assert target.zeros(list(BASE), {}) == {}


@pytest.mark.parametrize("folder", ODD_NAMES)
def test_the_line_that_serves_reads_back_as_it_was_meant(
    name: str, target: Server, folder: str, tmp_path: Path
) -> None:
    line = target.serve_line(BASE_MODEL, tmp_path / folder, 8)
    words = shlex.split(line)
    assert line.startswith(LAWS[name].command)
    last = words[-1]
    found = json.loads(last).values() if last.startswith("{") else last.split("=")
    assert [*found] == [folder, str(tmp_path / folder)]
    at = words.index(BASE_MODEL) + 1
    pinned = shlex.split(target.serve_line(f"{BASE_MODEL}@v2", tmp_path / folder, 8))
    assert pinned == [*words[:at], "--revision", "v2", *words[at:]]


@pytest.mark.usefixtures("pool")
def test_modules_that_a_program_may_not_adapt_are_named(name: str, target: Server) -> None:
    assert target.not_surely_served(BASE) == []
    assert target.not_surely_served([*BASE, "lm_head"]) == ["lm_head"]
    write_adapter(Path("head"), random_factors({"lm_head": (90, 32)}, 2, seed=3))
    told = ok("merge", "head", "--for", name, "-o", "head-out").err
    assert f"whether {target.title} adapts lm_head depends on the model: not checked" in told
