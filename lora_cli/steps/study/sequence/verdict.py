"""What a sequence says, by the rules of docs/sequence.md."""

from collections.abc import Mapping

from lora_cli.reports.study_facts import Control, Outcome
from lora_cli.steps.study.verdict import Asks


def _summary(outcomes: Mapping[Control, Outcome]) -> str:
    base, sequential, alone = (outcomes[control] for control in MERGING.questions)
    if base in ("few", "missing"):
        return "This sequence cannot say whether merging keeps what was learnt."
    if base == "worse":
        return "Merging does harm here: the base is better."
    if base == "open":
        return "No merge is shown to be better than the base."
    if sequential == "worse":
        return "Merging beats the base, but training one LoRA on is better."
    if sequential != "better":
        return "Merging beats the base, but is not shown to keep more than training one LoRA on."
    price = ", but less than a LoRA for each task" if alone == "worse" else ""
    return f"Merging keeps more here than training one LoRA on{price}."


MERGING = Asks(
    questions={
        "base": "Better than the base?",
        "sequential": "Better than training one LoRA on, task after task?",
        "alone": "Better than a LoRA of its own for each task?",
    },
    absent={
        "base": "The base has no result yet.",
        "sequential": "Sequential training has no result: add sequential to --rules.",
        "alone": "The LoRAs alone have no result yet.",
    },
    follows={
        ("base", "better"): "After the last task, something of what was learnt is there.",
        ("base", "worse"): "Use the base as it is.",
        (
            "base",
            "open",
        ): "Nothing here says that the merged LoRA is of use. Test on more examples, or train for longer.",
        ("sequential", "better"): "Merging keeps more of the earlier tasks than it costs of the later ones.",
        ("sequential", "worse"): "Train one LoRA on instead.",
        ("sequential", "open"): "Training one LoRA on may do as well, and needs no merge.",
        ("alone", "better"): "The tasks help one another in one LoRA.",
        ("alone", "worse"): "Where the task of a prompt is known, keep a LoRA for each.",
        ("alone", "open"): "One merged LoRA is not shown to cost anything beside one for each task.",
    },
    nothing="Nothing was merged: no rule but sequential training has a result for a whole seed.",
    summary=_summary,
)
"""The questions of a sequence, asked of the rule that merges and ends best."""
