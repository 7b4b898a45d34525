"""The options of a merge."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lora_cli.methods import MethodFolder, file_names
from lora_cli.options import Flag, Options
from lora_cli.precision import Precision

if TYPE_CHECKING:
    Server = str
else:  # one choice per server of exports/
    Server = Literal[file_names("lora_cli.exports", "Server")]
Missing = Literal["zero", "renorm"]

METHODS = MethodFolder("lora_cli.merge_methods", "merge method")
HOW, WHAT, SIZE, FORM = "How to merge", "What to merge", "Size of the result", "Form of the result"

Rank = Annotated[
    str, Flag(help="Rank of the result: a number, sum (of all ranks), or auto (up to rank 64).", panel=SIZE)
]
Energy = Annotated[
    float | None, Flag(help="Keep this share of the squared norm in each module, such as 0.99.", panel=SIZE)
]


class MergeOptions(Options, frozen=True, kw_only=True):
    """The options that decide the result of a merge, besides the adapters, their weights and the base model.

    `method` is "" for the default of `MergeSources`. `rank` is a number, "sum" (exact) or "auto" (up to 64, or the
    largest rank among the adapters if that is more). `scope` names the parts of the model to merge, like
    "layers=0-15,20" or "modules=q_proj,*.mlp.*"; all must hold. `missing` is the treatment of an adapter in modules
    that it lacks: "zero" counts a zero update; "renorm" spreads its weight over the others there. `saved_modules` is
    "refuse", "drop", or the `id@commit` of the adapter whose modules the result takes. `device` is torch's name of the
    device for the arithmetic.
    """

    method: Annotated[
        str,
        Flag(
            help="Merge method; 'lora methods' lists and explains all of them.",
            short="-m",
            default="norm-matched; linear with --coef",
            panel=HOW,
        ),
    ] = ""
    knobs: Mapping[str, Any] = {}
    lambda_: Annotated[float, Flag(help="Factor on the whole result.", panel=HOW)] = 1.0
    norm_match: Annotated[
        bool, Flag(help="Scale each module to the weighted mean of its adapters' norms.", panel=HOW)
    ] = False
    missing: Annotated[
        Missing,
        Flag(help="How an adapter counts in a module that it lacks: zero update, or left out (renorm).", panel=HOW),
    ] = "zero"
    scope: Annotated[
        tuple[str, ...],
        Flag(
            help="Merge only these parts: layers=0-15,20 or modules=q_proj,*.mlp.*; repeatable, all hold.", panel=WHAT
        ),
    ] = ()
    saved_modules: Annotated[
        str,
        Flag(
            help="Modules saved whole, such as heads: refuse them, drop them, or take those of this adapter.",
            metavar="refuse|drop|ADAPTER",
            panel=WHAT,
        ),
    ] = "refuse"
    rank: Rank = "auto"
    energy: Energy = None
    compact: Annotated[
        bool, Flag(help="Leave each module at its own rank: smaller, but not every server reads it.", panel=SIZE)
    ] = False
    dtype: Annotated[Precision, Flag(help="Precision on disk; auto is the parents'.", panel=FORM)] = "auto"
    dense: Annotated[bool, Flag(help="Write whole updates (delta.safetensors) in place of a LoRA.", panel=FORM)] = False
    for_: Annotated[
        Server | None,
        Flag(help="Follow the rules of a server, and print the command that serves the result.", panel=FORM),
    ] = None
    device: str = "cpu"


class MergeSources(Options, frozen=True, kw_only=True):
    """The sources of a merge's adapters and weights."""

    @property
    def method(self) -> str:
        """The default method. Coefficients were learnt for a weighted sum."""
        return "norm-matched" if self.coef is None else "linear"

    weights: Annotated[
        str | None,
        Flag(
            help="average (1/N each), sum (1 each), or numbers with commas.",
            default="the method's, mostly average",
            panel=WHAT,
        ),
    ] = None
    selection: Annotated[str | None, Flag(help="A selection's name, in place of ids.", panel=WHAT)] = None
    dedupe: Annotated[
        float | None,
        Flag(
            help="Skip near copies: adapters whose cosine with an earlier one is at least this, such as 0.95.",
            panel=WHAT,
        ),
    ] = None
    coef: Annotated[
        Path | None, Flag(help="Learnt coefficients: the coefficients.json that lora fit wrote.", panel=WHAT)
    ] = None
    data: Annotated[
        tuple[str, ...],
        Flag(
            help="For regmean: a task file, to record the activations of each module; repeat with ADAPTER= for own "
            "ones.",
            metavar="[ADAPTER=]FILE",
            panel=WHAT,
        ),
    ] = ()
    locked: Annotated[Path | None, Flag(help="Rebuild the merge of this run.json, byte for byte.", panel=WHAT)] = None
