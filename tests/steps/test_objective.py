"""The objective of a search: metrics as dense weights have them, the user's command, and the state of a killed one."""

import itertools
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_cli.errors import DataError, Refused, UsageError
from lora_cli.fit_methods import Learning
from lora_cli.formats.reader import OpenAdapter
from lora_cli.merge_options import MergeOptions
from lora_cli.metrics import METRICS
from lora_cli.metrics.exact import exact
from lora_cli.models.base_model import BaseModel
from lora_cli.models.generate import generate
from lora_cli.models.mixture import Mixture
from lora_cli.recipes import FIT_METHODS, EvalOptions, Shape
from lora_cli.records import Example
from lora_cli.steps.evaluate.groups import Judging
from lora_cli.steps.fit.command import Command
from lora_cli.steps.fit.fit import FitResult, Fitting, fit
from lora_cli.steps.fit.objective import ByAnswers, ByLikelihood
from lora_cli.steps.fit.search import costs
from lora_cli.steps.merge.plan import checked_options
from lora_cli.steps.merge.stream import MergePlan, plan
from tests.adapters_on_disk import random_factors, write_adapter
from tests.tiny_bases import characters, examples, llama, opened, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {"model.layers.0.mlp.up_proj": (48, 32), "model.layers.1.self_attn.q_proj": (32, 32)}
FACTORS = [random_factors(SHAPES, 2 + seed, seed=seed) for seed in range(2)]
THETAS = torch.tensor([(0.0, 0.0), (1.0, -0.5), (0.3, 1.2)])
TASK = examples(10)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return llama()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[OpenAdapter]:
    folder = tmp_path_factory.mktemp("pool")
    return [opened(write_adapter(folder / str(place), one)) for place, one in enumerate(FACTORS)]


@pytest.fixture(scope="module")
def mixture(base: BaseModel, pool: list[OpenAdapter]) -> Mixture:
    return Mixture(base, pool, FIT_METHODS.load("lorahub")(2).parameters)


@pytest.fixture(scope="module")
def planned(base: BaseModel, pool: list[OpenAdapter]) -> MergePlan:
    options = checked_options(MergeOptions(method="linear", rank="sum"))
    return plan(pool, [1.0, 1.0], options, base="acme/tiny", skeleton=base.skeleton)


def dense(theta: list[float]) -> BaseModel:
    """The base with the weighted sum of the updates in its weights."""
    model = tiny_llama()
    for module in SHAPES:
        added = sum(
            c * (one[module][0].double() @ one[module][1].double()) for c, one in zip(theta, FACTORS, strict=True)
        )
        weight = model.get_submodule(module).weight
        weight.data = (weight.data.double() + added).float()
    return BaseModel("acme/tiny", model, characters())


def answered(base: BaseModel, mixture: Mixture, task: list[Example], options: EvalOptions) -> list[list[float]]:
    """The values of THETAS, all together and one by one."""
    objective = ByAnswers(base, mixture, Judging.of(base, task, options))
    assert objective.at_once > len(THETAS)
    with mixture.applied(base):
        return [objective.values(THETAS), [objective.values(one[None])[0] for one in THETAS]]


def test_likelihoods_are_those_of_dense_weights(base: BaseModel, mixture: Mixture) -> None:
    objective = ByLikelihood(base, mixture, base.encode_all(TASK), METRICS.get("nll"))
    with mixture.applied(base):
        found = objective.values(THETAS)
    assert found == pytest.approx(
        [-math.fsum(dense(theta).log_likelihoods(TASK)) / len(TASK) for theta in THETAS.tolist()], rel=1e-4
    )


def test_generated_answers_are_those_of_dense_weights(base: BaseModel, mixture: Mixture) -> None:
    prompts, models = [one.prompt for one in TASK], [dense(theta) for theta in THETAS.tolist()]
    written = [generate(model, prompts, max_new_tokens=3) for model in models]
    # A third of the answers are what each of the models writes.
    expected = [
        replace(one, completion=text) for place, one in enumerate(TASK) if (text := written[place % 3][place]).strip()
    ]
    right = [
        exact(generate(model, [one.prompt for one in expected], max_new_tokens=3), [one.completion for one in expected])
        for model in models
    ]
    shares = [sum(own) / len(own) for own in right]
    assert len(set(shares)) > 1
    assert min(shares) > 0
    for found in answered(base, mixture, expected, EvalOptions(metric="exact", max_new_tokens=3)):
        assert found == pytest.approx(shares)


def test_choices_are_those_of_dense_weights(base: BaseModel, mixture: Mixture) -> None:
    options = ("xy", "aa", "q", "bca")
    asked = [replace(one, completion=options[place % 4], choices=options) for place, one in enumerate(TASK)]
    shares = []
    for theta in THETAS.tolist():
        model, right = dense(theta), 0
        for one in asked:
            read = [replace(one, completion=text) for text in options]
            sums = [model.encode(part).tokens * model.log_likelihoods([part])[0] for part in read]
            right += options[sums.index(max(sums))] == one.completion
        shares.append(right / len(asked))
    for found in answered(base, mixture, asked, EvalOptions(metric="choice")):
        assert found == pytest.approx(shares)


def test_a_higher_value_is_a_lower_cost_and_what_is_not_finite_the_highest(mixture: Mixture) -> None:
    for better, sign in (("higher", -1), ("lower", 1)):
        how: Learning = FIT_METHODS.load("lorahub")(2, objective="some command", better=better, l1=0.1)
        values = [0.5, math.nan, math.inf * -sign]
        assert costs(values, THETAS, mixture, how) == pytest.approx([sign * 0.5, math.inf, math.inf])
        assert costs([0.5], THETAS[1:2], mixture, how) == pytest.approx([sign * 0.5 + 0.1 * 0.75])
    for metric, sign in (("exact", -1), ("choice", -1), ("nll", 1)):
        how = FIT_METHODS.load("lorahub")(2, objective=metric)
        assert costs([0.25], THETAS[:1], mixture, how) == [sign * 0.25]


@pytest.fixture(scope="module")
def taught(base: BaseModel, mixture: Mixture) -> list[Example]:
    """A task that the mixture of 0.8 and -0.6 solves, and the base does not."""
    prompts = [one.prompt for one in examples(24)]
    written = generate(dense([0.8, -0.6]), prompts, max_new_tokens=3)
    pairs = [(prompt, text) for prompt, text in zip(prompts, written, strict=True) if text.strip()]
    assert len({text for _, text in pairs}) > 1
    return [Example(id=str(n), prompt=prompt, completion=text) for n, (prompt, text) in enumerate(pairs)]


def searched(
    base: BaseModel, pool: list[OpenAdapter], task: list[Example], evaluations: int, **knobs: object
) -> FitResult:
    shape = Shape(preset="lorahub", l1=0.0, evaluations=evaluations, **knobs)
    return fit(base, pool, task, Fitting(shape=shape))


def weights(result: FitResult) -> list[float]:
    return [own[0] for own in result.coefficients.values[next(iter(SHAPES))]]


def test_a_search_over_likelihood_reaches_what_a_grid_finds(
    base: BaseModel, pool: list[OpenAdapter], mixture: Mixture, taught: list[Example]
) -> None:
    result = searched(base, pool, taught, 150)
    assert result.judged is not None
    training, validation = Fitting().held.parts(taught, seed=0)
    axis = torch.linspace(-1.5, 1.5, 21)
    grid = torch.cartesian_prod(axis, axis)
    objective = ByLikelihood(base, mixture, base.encode_all(training), METRICS.get("nll"))
    with mixture.applied(base):
        values = [value for group in grid.split(32) for value in objective.values(group)]
    start, best = result.judged.training
    assert best <= min(values) + 1e-3
    assert start == pytest.approx(values[len(values) // 2], rel=1e-5)
    assert best < 0.9 * start
    # What is told is what the weights found do.
    model = dense(weights(result))
    assert best == pytest.approx(-sum(model.log_likelihoods(training)) / len(training), rel=1e-4)
    assert result.judged.after == pytest.approx([-one for one in model.log_likelihoods(validation)], rel=1e-4)
    assert result.judged.after == pytest.approx(result.learnt.each_after, rel=1e-5)


def test_a_search_over_exact_matches_raises_them(
    base: BaseModel, pool: list[OpenAdapter], taught: list[Example]
) -> None:
    result = searched(base, pool, taught, 100, objective="exact", max_new_tokens=3)
    assert result.judged is not None
    assert result.judged.better == "higher"
    training, validation = Fitting().held.parts(taught, seed=0)

    def share(model: BaseModel, part: list[Example]) -> float:
        outputs = generate(model, [one.prompt for one in part], max_new_tokens=3)
        return sum(exact(outputs, [one.completion for one in part])) / len(part)

    model = dense(weights(result))
    assert result.judged.training == pytest.approx((share(base, training), share(model, training)))
    assert sum(result.judged.before) / len(validation) == pytest.approx(share(base, validation))
    assert sum(result.judged.after) / len(validation) == pytest.approx(share(model, validation))
    assert result.judged.training[1] > result.judged.training[0]


SCORE = """
import json, os, sys
folder = sys.argv[1]
assert os.environ["LORA_CANDIDATE"] == folder
assert os.path.exists(os.path.join(folder, "adapter_model.safetensors"))
values = json.load(open(os.path.join(folder, "coefficients.json")))["values"]
[a], [b] = next(iter(values.values()))
print("a line before it")
print((a - 0.7) ** 2 + (b + 0.3) ** 2)
"""


@pytest.fixture
def command(tmp_path: Path) -> Command:
    (tmp_path / "score.py").write_text(SCORE)
    return Command(text=f"'{sys.executable}' -S '{tmp_path}/score.py' {{}}")


def by_command(
    base: BaseModel, pool: list[OpenAdapter], planned: MergePlan, command: Command, evaluations: int, state: Path | None
) -> FitResult:
    shape = Shape(preset="lorahub", l1=0.0, evaluations=evaluations, objective=command.text, better="lower")
    how = Fitting(shape=shape, command=command, plan=planned)
    return fit(base, pool, TASK, how, checkpoint=state)


@pytest.mark.slow
def test_a_command_leads_the_search_to_its_own_optimum(
    base: BaseModel, pool: list[OpenAdapter], planned: MergePlan, command: Command, tmp_path: Path
) -> None:
    result = by_command(base, pool, planned, command, 100, tmp_path / "state.npz")
    assert weights(result) == pytest.approx([0.7, -0.3], abs=0.02)
    assert result.judged is not None
    assert result.judged.training[0] == pytest.approx(0.7**2 + 0.3**2)
    assert result.judged.training[1] < 1e-3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["score.py", "state.json"]


def test_a_command_gets_the_candidate_as_peft_reads_it(
    base: BaseModel, pool: list[OpenAdapter], planned: MergePlan, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    copying = f"""sh -c 'n=$(ls {kept} | wc -l); cp -r "$LORA_CANDIDATE" {kept}/$n; echo $n'"""
    shape = Shape(preset="lorahub", evaluations=3, objective=copying, better="higher")
    how = Fitting(shape=shape, command=Command(text=copying), plan=planned)
    result = fit(base, pool, TASK, how, reinit=None)
    folders = sorted(kept.iterdir())
    assert [folder.name for folder in folders] == ["0", "1", "2"]
    for folder in folders:
        theta = [own[0] for own in json.loads((folder / "coefficients.json").read_text())["values"][next(iter(SHAPES))]]
        adapter = opened(folder)
        for module in SHAPES:
            wanted = sum(c * (one[module][0] @ one[module][1]) for c, one in zip(theta, FACTORS, strict=True))
            assert torch.allclose(adapter.read(module).dense(), torch.as_tensor(wanted), atol=1e-5)
    assert weights(result) == theta
    assert "LORA_CANDIDATE" not in os.environ
    # The control's candidates are made of its noise.
    fit(base, pool, TASK, how, reinit="norm")
    noise = opened(kept / "5")
    assert not torch.allclose(
        noise.read(next(iter(SHAPES))).dense(), opened(folders[2]).read(next(iter(SHAPES))).dense()
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "sh -c 'echo one >&2; echo oops >&2; exit 3'",
            r"^the objective sh -c 'echo one .*' ended with code 3: one / oops$",
        ),
        ("sh -c 'kill -9 $$'", r"ended by signal 9: it said nothing$"),
        ("true", r"printed '', not a number$"),
        ("sh -c 'echo 1; echo good; echo why >&2'", r"printed 'good', not a number; on stderr: why$"),
        ("sh -c 'echo slow >&2; sleep 60 & sleep 60'", r"takes more than 0\.5 s: slow$"),
        (f"{os.devnull} 1", r"no program '/dev/null'$"),
    ],
)
def test_a_command_that_gives_no_number_is_named(text: str, said: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises((Refused, UsageError), match=said):
        Command(text=text, seconds=0.5 if "sleep" in text else math.inf).number(tmp_path)
    assert time.monotonic() - began < 40


def test_a_command_that_prints_without_end_fills_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    began = time.monotonic()
    command = Command(text="sh -c 'yes told >&2 & exec yes'", seconds=300.0)
    with pytest.raises(Refused, match=r"prints more than 67\.1 MB: (y|told)$"):
        command.number(tmp_path)
    assert time.monotonic() - began < 200
    assert not [*tmp_path.iterdir()]
    assert Command(text="sh -c 'yes | head -c 9000000; echo 0.5'").number(tmp_path) == 0.5


def test_a_command_that_cannot_be_read_is_a_usage_error() -> None:
    for text, said in (
        ("sh -c 'echo", "No closing quotation"),
        (" ", "--objective is empty"),
        ("exct", "no program 'exct'"),
    ):
        with pytest.raises(UsageError, match=said):
            Command(text=text)


def test_children_of_a_command_end_with_it(tmp_path: Path) -> None:
    assert Command(text=f"sh -c 'sleep 60 & echo $! > {tmp_path}/child; echo 0.25'").number(tmp_path) == 0.25
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    deadline = time.monotonic() + 20
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)


def alive(stat: Path) -> bool:
    try:
        return stat.read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_number_that_is_not_finite_never_wins_and_is_refused_at_the_start(
    base: BaseModel, pool: list[OpenAdapter], planned: MergePlan, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    first = Command(text=f"sh -c 'echo . >> {log}; test $(wc -l < {log}) -eq 1 && echo 1 || echo nan'")
    result = by_command(base, pool, planned, first, 8, None)
    assert result.judged is not None
    assert (weights(result), result.learnt.best_step, result.judged.training) == ([0.0, 0.0], 0, (1.0, 1.0))
    with pytest.raises(Refused, match="is nan at the start"):
        by_command(base, pool, planned, Command(text="echo nan"), 8, None)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("objective", "at"), [*itertools.product(("nll", "exact"), (0, 1, 7, 13, 19))])
def test_a_killed_search_resumes_to_the_same_bits(
    base: BaseModel, pool: list[OpenAdapter], taught: list[Example], tmp_path: Path, objective: str, at: int
) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if "fit: adapters" in what and done == at:
            raise Killed

    seen: list[int] = []
    how = Fitting(shape=Shape(preset="lorahub", evaluations=20, objective=objective, max_new_tokens=3))
    whole = fit(base, pool, taught, how)
    state = tmp_path / "fit.npz"
    with pytest.raises(Killed):
        fit(base, pool, taught, how, checkpoint=state, progress=kill)
    known = json.loads(state.with_suffix(".json").read_text())["values"] if at else []
    assert len(known) == at
    resumed = fit(base, pool, taught, how, checkpoint=state, progress=lambda what, done, total: seen.append(done))
    assert (resumed.learnt, resumed.coefficients, resumed.judged) == (whole.learnt, whole.coefficients, whole.judged)
    # A finished state holds all values, and gives the same again.
    again = fit(base, pool, taught, how, checkpoint=state)
    assert (again.learnt, again.coefficients) == (whole.learnt, whole.coefficients)


def test_a_search_that_stops_at_every_generation_ends_as_one_that_does_not(
    base: BaseModel, pool: list[OpenAdapter], tmp_path: Path
) -> None:
    shape = Shape(preset="lorahub", evaluations=20)
    whole = fit(base, pool, TASK, Fitting(shape=shape))
    hurried, state, done = Fitting(shape=shape, deadline=0.0), tmp_path / "fit.npz", []
    while not done or done[-1] < 20:
        part = fit(base, pool, TASK, hurried, checkpoint=state)
        done.append(part.learnt.done)
        assert part.learnt.finished == (done[-1] == 20)
        assert part.learnt.curve == whole.learnt.curve[: len(part.learnt.curve)]
    assert done == [1, 7, 13, 19, 20]
    assert part.learnt == whole.learnt


@pytest.mark.parametrize("text", ["broken", "{}", "[]", '{"key": "other", "values": [1.0]}', '{"values": 3}'])
def test_a_state_of_another_search_or_a_broken_one_is_not_taken_up(
    base: BaseModel, pool: list[OpenAdapter], tmp_path: Path, text: str
) -> None:
    how = Fitting(shape=Shape(preset="lorahub", evaluations=8))
    whole = fit(base, pool, TASK, how)
    (tmp_path / "fit.json").write_text(text)
    assert fit(base, pool, TASK, how, checkpoint=tmp_path / "fit.npz").learnt == whole.learnt


def test_a_failing_command_keeps_what_was_evaluated(
    base: BaseModel, pool: list[OpenAdapter], planned: MergePlan, tmp_path: Path
) -> None:
    log, broken = tmp_path / "log", tmp_path / "broken"
    script = (
        f"echo . >> {log}; test -e {broken} && test $(wc -l < {log}) -ge 4 && exit 7; wc -c < {{}}/coefficients.json"
    )
    command, state = Command(text=f"sh -c '{script}'"), tmp_path / "fit.npz"
    whole = by_command(base, pool, planned, command, 8, None)
    log.unlink()
    broken.touch()
    with pytest.raises(Refused, match="ended with code 7"):
        by_command(base, pool, planned, command, 8, state)
    assert len(json.loads((tmp_path / "fit.json").read_text())["values"]) == 3
    broken.unlink()
    resumed = by_command(base, pool, planned, command, 8, state)
    assert (resumed.learnt, resumed.coefficients, resumed.judged) == (whole.learnt, whole.coefficients, whole.judged)
    assert len(log.read_text()) == 2 * (4 + 5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fit.json", "log"]


def test_what_cannot_be_judged_is_said(base: BaseModel, pool: list[OpenAdapter]) -> None:
    def run(**knobs: object) -> FitResult:
        return fit(base, pool, TASK, Fitting(shape=Shape(preset="lorahub", **knobs)))

    with pytest.raises(DataError, match="more with 60 new ones"):
        run(objective="exact", max_new_tokens=60)
    with pytest.raises(DataError, match="no choices"):
        run(objective="choice")
    with pytest.raises(UsageError, match="say which of its numbers are better"):
        run(objective="./score {}")
    with pytest.raises(UsageError, match="--better is for an --objective that is a command"):
        run(objective="exact", better="higher")
