"""`lora pool`: the catalogued adapters, and the facts about each. One file = one command, imported when it is named."""

import typer

from lora_cli.commands.lazy import LazyGroup

SUMMARIES = {
    "sync": "Bring the catalogue up to date with the Hub, or with a folder tree of adapters.",
    "list": "List adapters, one row each, unusable ones with the reason.",
    "search": "Find adapters by words in their id, author, target modules or card, the best match first.",
    "show": "Show all facts about one adapter, their sources, its newest scores, and the reason if it is unusable.",
    "stats": "Count the catalogue's adapters by status, base, rank, licence, author, data type and reason.",
    "report": "Write the catalogue as one HTML page: counts with bars, and a table that sorts and filters.",
    "sql": "Query the catalogue in SQL.",
    "import": "Take scores of adapters, or the adapters of another pool, into the catalogue: all of a file or nothing.",
    "export": "Write adapters with all their facts, and their newest scores, to a file or stdout.",
    "rm": "Forget adapters: delete their rows, keep their files.",
    "gc": "Show what the caches hold of the catalogue's adapters and what can go; with --yes delete that.",
    "selections": "List the selections, the newest first, or drop some.",
    "doctor": "Check every page of the catalogue's database; with --rescue save the whole rows of a damaged one.",
    "path": "Print the path of the catalogue's database.",
    "fetch": "Download the weights of adapters into the Hub client's cache and check them.",
    "verify": "Check adapters afresh, ignoring the catalogue, and show the share of modules that fit the base model.",
    "evaluate": "Score usable adapters of the pool on a task, on one load of the base, and keep the scores in the "
    "catalogue.",
    "similarity": "Compare all pairs of adapters by the cosine of their whole updates: clusters, and the nearest one "
    "of each.",
}


class Pool(LazyGroup):
    """The `lora pool` command."""

    package = "lora_cli.commands.pool"
    summaries = SUMMARIES


app = typer.Typer(cls=Pool, help="The adapters of the catalogue: find them, list them, fetch and check them.")


def register(root: typer.Typer) -> None:
    """Add `lora pool` to the command tree."""
    root.add_typer(app, name="pool")
