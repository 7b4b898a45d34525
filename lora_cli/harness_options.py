"""The options of evaluations by lm-evaluation-harness."""

from typing import Annotated

from lora_cli.errors import UsageError
from lora_cli.options import Flag, Options

HARNESS = "Tasks of lm-evaluation-harness"


class HarnessOptions(Options, frozen=True, kw_only=True):
    """Tasks of EleutherAI's lm-evaluation-harness; `harness` names them, by the harness's names or by files."""

    harness: Annotated[
        str,
        Flag(
            help="Score these tasks of lm-evaluation-harness instead of a task file: names, or its own YAML files.",
            metavar="TASK,…",
            panel=HARNESS,
        ),
    ] = ""
    limit: Annotated[int | None, Flag(help="Only the first examples of each task.", minimum=1, panel=HARNESS)] = None
    fewshot: Annotated[
        int | None, Flag(help="Examples in front of each question.", minimum=0, default="the task's own", panel=HARNESS)
    ] = None
    trust_task: Annotated[bool, Flag(help="Run the code in task files: functions and templates.", panel=HARNESS)] = (
        False
    )

    def __post_init__(self) -> None:
        if self.harness and not self.tasks:
            raise UsageError("--harness names no task")
        if not self.harness and (self.limit is not None or self.fewshot is not None or self.trust_task):
            raise UsageError("--limit, --fewshot and --trust-task are for --harness", hint="give --harness TASK")
        if len({*self.tasks}) < len(self.tasks):
            raise UsageError(f"--harness names {max(self.tasks, key=self.tasks.count)!r} twice")

    @property
    def tasks(self) -> list[str]:
        """The tasks as the user names them."""
        return [part.strip() for part in self.harness.split(",") if part.strip()]
