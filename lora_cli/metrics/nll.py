"""The surprise of a model at the expected answers."""

from collections.abc import Sequence

from lora_cli.methods import method


@method("likelihood", score="mean", better="lower")
def nll(log_likelihoods: Sequence[float]) -> list[float]:
    """Mean negative log-likelihood.

    An example's value is the mean of -log p over the tokens that are learnt, in nats; the end of the turn is one of
    them. Nothing is generated, so an evaluation takes one pass per example.

    Source: the loss that `lora fit` and `lora train` lower.
    """
    return [-log_likelihood for log_likelihood in log_likelihoods]
