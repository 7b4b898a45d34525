"""The measures of continual learning: computed by hand, and beside a float64 reference that shares no code."""

from dataclasses import asdict

import numpy as np
import pytest

from lora_cli.steps.study.sequence.measures import continual, mean_matrix

BY_HAND = [
    [0.9, 0.1, 0.2],
    [0.6, 0.8, 0.3],
    [0.5, 0.7, 0.6],
]
ALONE = [0.9, 0.85, 0.7]


def test_by_hand() -> None:
    found = continual(BY_HAND, ALONE)
    assert found.final == pytest.approx(0.6)
    assert found.forgetting == pytest.approx((0.4 + 0.1) / 2)
    assert found.backward_transfer == pytest.approx((-0.4 - 0.1) / 2)
    assert found.backward_transfer_by_t == pytest.approx(-0.5 / 3)
    assert found.forward_transfer == pytest.approx((0.9 + 0.8 + 0.6) / 3 - (0.9 + 0.85 + 0.7) / 3)


def test_two_tasks_of_which_the_first_is_forgotten() -> None:
    found = continual([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0])
    assert asdict(found) == {
        "final": 0.5,
        "forgetting": 1.0,
        "backward_transfer": -1.0,
        "backward_transfer_by_t": -0.5,
        "forward_transfer": 0.0,
    }


def test_the_best_before_the_end_counts_even_if_it_came_before_the_task_itself() -> None:
    found = continual([[0.5, 0.9, 0.0], [0.5, 0.4, 0.0], [0.5, 0.4, 0.3]], [0.5, 0.4, 0.3])
    assert found.forgetting == pytest.approx((0.0 + 0.5) / 2)
    assert found.backward_transfer == 0.0


def test_a_gain_after_the_task_is_backward_transfer_and_negative_forgetting() -> None:
    found = continual([[0.5, 0.0], [0.8, 0.7]], [0.5, 0.7])
    assert found.forgetting == pytest.approx(-0.3)
    assert found.backward_transfer == pytest.approx(0.3)


def test_of_a_loss_the_signs_turn_but_not_that_of_the_final_score() -> None:
    losses, alone = [[-x for x in row] for row in BY_HAND], [-x for x in ALONE]
    found, turned = continual(losses, alone, better="lower"), continual(BY_HAND, ALONE)
    assert asdict(found) == asdict(turned) | {"final": -turned.final}


@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_equals_the_formulas_in_float64(tasks: int) -> None:
    draw = np.random.default_rng(tasks)
    a, alone = draw.random((tasks, tasks)), draw.random(tasks)
    found = continual(a.tolist(), alone.tolist())
    lost, back = 0.0, 0.0
    for j in range(tasks - 1):
        lost += np.max(a[:-1, j]) - a[-1, j]
        back += a[-1, j] - a[j, j]
    assert list(asdict(found).values()) == pytest.approx(
        [a[-1].mean(), lost / (tasks - 1), back / (tasks - 1), back / tasks, np.diag(a).mean() - alone.mean()],
        rel=1e-13, abs=1e-15,
    )  # fmt: skip


@pytest.mark.parametrize("a", [[[1.0]], [[1.0, 0.0]], [[1.0, 0.0], [0.0]], []])
def test_another_shape_has_no_measures(a: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="T of at least 2"):
        continual(a, [1.0] * len(a))


def test_the_mean_of_runs_is_taken_entry_by_entry() -> None:
    assert mean_matrix([[[1.0, 2.0], [3.0, 4.0]], [[3.0, 2.0], [1.0, 0.0]]]) == [[2.0, 2.0], [2.0, 2.0]]
