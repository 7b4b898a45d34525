"""Every command: documented, with examples that run; light to start; and the four lines of the demo's folder."""

import importlib.metadata
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_cli.app import SUMMARIES
from lora_cli.commands.pool import SUMMARIES as POOL_SUMMARIES
from lora_cli.world import World
from lora_cli.world.build import TARGETS
from tests import generate, warm
from tests.cli import ok, refused

COMMANDS = {words: command for words, command, _ in generate.commands()}
LEAVES = {words: command for words, command in COMMANDS.items() if not getattr(command, "commands", None)}
# A group that is a command as well.
LEAVES["lora study"] = COMMANDS["lora study"]


def examples_of(words: str) -> list[str]:
    """The example lines that close a command's help."""
    epilog = LEAVES[words].epilog or ""
    return [line.strip() for line in epilog.splitlines() if line.startswith("  ")]


def run(line: str, folder: Path, program: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A line of shell, typed in `folder`, with `lora` being this program, or that in a file."""
    (folder / ".bin").mkdir(exist_ok=True)
    own = folder / ".bin" / "lora"
    own.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m lora_cli "$@"\n')
    own.chmod(0o755)
    environment = {**os.environ, "PATH": f"{(program or own).parent}:{os.environ['PATH']}"}
    environment.pop("LORA_DB", None)
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_every_command_and_option_says_what_it_is(words: str) -> None:
    command = COMMANDS[words]
    assert command.help, words
    for parameter in command.params:
        assert parameter.help, (words, parameter.name)


def test_the_examples_name_only_tasks_of_every_size_of_the_demo() -> None:
    common = set.intersection(*map(set, TARGETS.values()))
    named = [name for words in LEAVES for name in re.findall(r"tasks/([\w-]+)\.", " ".join(examples_of(words)))]
    assert named
    assert set(named) <= common


@pytest.mark.parametrize("words", sorted(LEAVES))
def test_every_help_ends_with_at_least_two_examples(words: str) -> None:
    examples = examples_of(words)
    assert len(examples) >= 2
    assert all(words in example for example in examples)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A `lora` that has every library loaded."""
    with warm.program(tmp_path_factory.mktemp("warm")) as found:
        yield found


@pytest.mark.slow
def test_the_examples_of_every_help_run(own_world: World, program: Path) -> None:
    folder = own_world.folder
    assert run("lora pool sync && lora select -k 3", folder, program).returncode == 0
    # Demos are run by test_demo. The home is the folder, so that nothing is written into the tester's own.
    home = f"export HOME={shlex.quote(str(folder))} SHELL=/bin/bash; "
    first = ["lora pool sync", "lora select", "lora merge", "lora fit", "lora train", "lora eval", "lora study"]
    for words in [*first, *sorted(set(LEAVES) - {*first, "lora demo"})]:
        for example in examples_of(words):
            done = run(home + example.replace("| source", "> /dev/null"), folder, program)
            refusal = done.returncode == 5 and words == "lora pool verify"
            assert done.returncode == 0 or refusal, f"{example}\n{done.stdout}\n{done.stderr}"
            assert "Traceback" not in done.stderr, example


@pytest.mark.slow
def test_the_four_lines_work_as_written(own_world: World, program: Path) -> None:
    folder = own_world.folder
    for line in ("lora pool sync", "lora merge --method ties", "lora fit --data task.jsonl", "lora eval"):
        done = run(line, folder, program)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert bool(done.stdout) == ("sync" not in line), line
        assert done.stderr, line
    assert "changed the output on" in done.stderr
    again = run("lora fit --data task.jsonl", folder, program)
    assert again.returncode == 0
    assert "up to date" in again.stderr


@pytest.mark.slow
def test_data_flows_through_a_script(own_world: World, program: Path) -> None:
    folder = own_world.folder
    run("lora pool sync", folder, program)
    listed = run("lora pool list --where 'rank<=4' --where status=ok --json", folder, program)
    document = json.loads(listed.stdout)
    assert document["schema"] == "lora.pool.list/1"
    assert {row["status"] for row in document["rows"]} == {"ok"}
    usable = "lora pool list -q --where 'rank<=4' --where status=ok"
    merged = run(f"{usable} | lora merge - -o small --weights sum", folder, program)
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout == "small\n"
    record = json.loads((folder / "small" / "run.json").read_text())
    assert set(record["inputs"]) == {f"{row['id']}@{row['commit']}" for row in document["rows"]}
    closed = run("lora pool list | head -1; test ${PIPESTATUS[0]} -eq 0", folder)
    assert closed.returncode == 0
    assert closed.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("lora methods >&-", 0),
        ("lora methods --json >&- 2>&- <&-", 0),
        ("lora merge 2>&-", 3),
        ("lora merge - <&-", 3),
        ("lora --help | true; exit ${PIPESTATUS[0]}", 0),
        ("lora merge --help | true; exit ${PIPESTATUS[0]}", 0),
    ],
)
def test_streams_that_are_closed_change_no_exit_code(line: str, code: int, tmp_path: Path) -> None:
    done = run(line, tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def catalogued(world: World, program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shared world whose pool is catalogued."""
    folder = shutil.copytree(world.folder, tmp_path_factory.mktemp("catalogued") / "world")
    assert run("lora pool sync", folder, program).returncode == 0
    return Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["--help", "pool list", "select --by rank -k 2", "merge --help", "runs list"])
def test_light_commands_import_nothing_heavy(line: str, catalogued: Path) -> None:
    code = (
        "import sys\nfrom lora_cli.app import app\n"
        f"try:\n    app({shlex.split(line)!r}, prog_name='lora')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'numpy', 'transformers', 'peft'} & set(sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "LORA_DB"}
    subprocess.run([sys.executable, "-c", code], cwd=catalogued, env=environment, check=True)


def test_a_start_looks_for_no_garbage_among_what_it_imports(world: World) -> None:
    line = f"eval pool/tarn/mirror --data {world.targets[0].test} --dry-run"
    code = (
        "import gc, sys\nfrom lora_cli.__main__ import main\n"
        f"sys.argv[1:] = {shlex.split(line)!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'transformers' in sys.modules\nassert gc.get_stats()[2]['collections'] == 0"
    )
    subprocess.run([sys.executable, "-c", code], cwd=world.folder, check=True, capture_output=True)


def test_help_comes_at_once() -> None:
    def asked() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "lora_cli", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # The least of a few: neighbours slow some of them down.
    assert any(asked() <= 0.3 for _ in range(6))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [("lora me", "merge"), ("lora merge --method ", "ties"), ("lora pool s", "sync"), ("lora select --by r", "random")],
)
def test_the_shell_completes_commands_options_and_methods(words: str, expected: str) -> None:
    bash = {"_LORA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    code = "from lora_cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **bash}, capture_output=True, text=True, check=False
    )
    assert expected in done.stdout.split(), done
    zsh = {"_LORA_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **zsh}, capture_output=True, text=True, check=False
    )
    assert expected in done.stdout, done


def test_the_list_of_commands_says_what_each_command_says_of_itself() -> None:
    said = {words: command.help.split("\n\n")[0].replace("\n", " ") for words, command in COMMANDS.items()}
    assert {f"lora {name}": summary for name, summary in SUMMARIES.items()} == {
        words: text for words, text in said.items() if words.count(" ") == 1
    }
    of_pool = [text for words, text in said.items() if words.startswith("lora pool ")]
    for text, summary in zip(of_pool, POOL_SUMMARIES.values(), strict=True):
        assert f"{text} ".startswith(f"{summary} ")


def test_a_wrong_choice_is_one_sentence() -> None:
    told = refused(2, "merge", "--missing", "skip")
    assert told.splitlines()[0] == "lora: Invalid value for '--missing': 'skip' is not one of 'zero', 'renorm'."


def test_a_mistyped_command_is_recognised() -> None:
    assert "Did you mean 'methods'?" in refused(2, "method")


def test_generated_files_are_what_the_program_makes() -> None:
    stale = [file.name for file, text in generate.generated().items() if file.read_text("utf-8") != text]
    assert stale == [], "run python -m tests.generate"


def test_the_readme_links_to_what_exists() -> None:
    text = (generate.ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(((?!http)[^)#]+)", text)
    assert links
    assert [link for link in links if not (generate.ROOT / link).exists()] == []


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("nonsense", 2, "No such command 'nonsense'"),
        ("merge --densty 0.2", 2, "No such option"),
        ("pool list --sort", 2, "Option '--sort' requires an argument.\n  see 'lora pool list --help'"),
        ("merge", 3, "no adapters selected, and none usable"),
        ("merge nobody-knows", 3, "nobody-knows: not in the catalogue"),
        ("merge a b --method tise", 2, "did you mean 'ties'"),
        ("select", 3, "no usable adapter"),
        ("select --by rnk", 2, "did you mean 'rank'"),
        ("select --where 'rang=8'", 2, "rang"),
        ("select --by cosine", 2, "needs --target"),
        ("merge a=x", 2, "the weight after = is not a number"),
        ("merge a=1 b", 2, "some adapters have a weight"),
        ("merge a b --weights 1,2,3", 2, "3 numbers for 2 adapters"),
        ("runs show nothing", 3, "no run whose id starts with"),
        ("pool sync", 2, "base"),
        ("fit --data none.jsonl", 2, "base"),
        ("completion tcsh", 2, "'tcsh' is not one of"),
        ("merge --json x", 3, "not in the catalogue"),
    ],
)
def test_a_mistake_gives_one_clear_line_and_its_code(line: str, code: int, words: str) -> None:
    told = refused(code, *shlex.split(line))
    assert words in told
    assert len(told.strip().splitlines()) <= 2


@pytest.mark.parametrize("words", ["", "pool", "task", "runs", "config"])
def test_a_group_named_alone_shows_its_help(words: str) -> None:
    told = ok(*words.split())
    assert told.out == ok(*words.split(), "--help").out
    assert "Usage: lora" in told.out
    assert "..." not in told.out.split("Commands:")[1]


def test_the_version_is_that_of_the_package() -> None:
    assert ok("--version").out == f"lora {importlib.metadata.version('lora-cli')}\n"


def test_the_help_of_merge_fits_a_screen_and_lists_a_methods_options_where_it_is_named() -> None:
    plain = ok("merge", "--help").out
    assert len(plain.splitlines()) <= 85
    assert "--gamma" not in plain
    assert "--system" not in plain
    ties = ok("merge", "-m", "ties", "--help").out
    assert ties == ok("merge", "--help", "--method=ties").out
    assert re.search(r"Options of --method ties:\n  --density <0 < x <= 1>\s.*\[default: 0.2\]", ties, flags=re.DOTALL)
    assert "--gamma" not in ties
    assert "--gamma" in ok("merge", "-m", "core", "--help").out
    assert "--system" in ok("merge", "-m", "regmean", "--help").out


def completed(line: str, folder: Path) -> list[str]:
    """What bash offers at the end of `line`."""
    place = len(line.split()) - (not line.endswith(" "))
    command = f"_LORA_COMPLETE=complete_bash COMP_WORDS={shlex.quote(line)} COMP_CWORD={place} lora"
    return run(command, folder).stdout.split()


@pytest.mark.slow
def test_a_shell_completes_what_the_catalogue_holds(own_world: World, program: Path) -> None:
    folder = own_world.folder
    run("lora pool sync && lora select -k 2 --name first && lora merge --selection first", folder, program)
    ids = run("lora pool list -q", folder).stdout.split()
    assert completed("lora merge ", folder) == sorted(ids)
    start = ids[0][:-2]
    assert completed(f"lora diff {start}", folder) == sorted(id for id in ids if id.startswith(start))
    assert completed("lora fit --selection f", folder) == ["first"]
    assert completed("lora merge --method ti", folder) == ["ties"]
    assert completed("lora merge --missing ", folder) == ["zero", "renorm"]
    assert completed("lora pool list --where lic", folder) == ["licence="]
    assert "status=ok" in completed("lora pool list --where status=", folder)
    assert "rank>=8" in completed("lora pool list --where rank>=", folder)
    assert completed("lora pool list --where status!=gone,o", folder) == ["status!=gone,ok"]
    assert completed("lora pool list --sort down", folder) == ["downloads"]
    [merge] = completed("lora runs show ", folder)
    assert "-merge-" in merge


def test_completion_offers_nothing_where_the_catalogue_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "lora.toml").write_text('db = "lora.toml"\n')
    assert completed("lora merge ", tmp_path) == []


def test_completion_is_installed_for_the_shell_in_use(tmp_path: Path) -> None:
    told = run(f"HOME={tmp_path} SHELL=/bin/bash lora completion --install", tmp_path)
    script = Path(told.stdout.strip())
    assert script.is_relative_to(tmp_path)
    assert "_LORA_COMPLETE=complete_bash" in script.read_text()
    refused = run(f"HOME={tmp_path} SHELL=/bin/tcsh lora completion --install", tmp_path)
    assert (refused.returncode, "no completion for the shell 'tcsh'" in refused.stderr) == (2, True)
    without = run(f"unset SHELL; HOME={tmp_path} lora completion", tmp_path)
    assert "complete_bash" in without.stdout
