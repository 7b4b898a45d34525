"""Selection by the score on a task."""

from lora_cli.methods import method
from lora_cli.selection_methods._trials import Standing, Trials


@method("trials")
def evaluation(trials: Trials) -> dict[int, Standing]:
    """Score on a task: every adapter answers every example.

    Scores that the catalogue holds are not computed again, imported ones count as well. Equal scores are ordered by the
    mean log-likelihood of the expected answers.

    Source: "evaluation" of arXiv 2602.12323, where equal scores keep the order of a file.
    """
    return dict(trials.judge(range(len(trials.names)), trials.examples))
