"""The full model card of a result: what the Hub reads, where it comes from, how it scores and how to load it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from lora_cli.catalogue.scores import VersionScore
from lora_cli.errors import Refused
from lora_cli.exports.vllm import vllm
from lora_cli.formats.base_names import canonical_base, is_hub_id, split_revision
from lora_cli.merge_options import METHODS
from lora_cli.methods import Method
from lora_cli.names import is_model, is_repo, is_revision, repo_and_folder
from lora_cli.recipes import FIT_METHODS
from lora_cli.steps.merge.card import code, licence_of_all, stated
from lora_cli.steps.pool.licences import Stated
from lora_cli.steps.push.result import Result
from lora_cli.text import counted, interval, percent, shortened

_MOST_DATASETS = 50
_LARGEST_WEIGHT = 1e9
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""transformers' class for each task of PEFT."""
_NOT_SHOWN = ("base", "weights", "coefficients", "order", "device", "data")
_KINDS = {"merge": ("Merged LoRA", ""), "fit": ("Merged LoRA", ", with learnt coefficients")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """An adapter that went into a result: its `id@commit`, or the one under which it is on the Hub."""

    pinned: str
    on_hub: bool
    licence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the catalogue and cards add to a result's own record."""

    parents: Mapping[str, Parent]
    base: Stated
    datasets: Sequence[str] = ()
    scores: Sequence[VersionScore] = ()


def full_card(result: Result, repo: str, told: Told) -> str:
    """The model card of a result that goes to `repo`."""
    base = _Base(result)
    parts = [
        _front(result, base, told),
        [f"# {repo.partition('/')[2]}", "", _made(result, base)],
        _parents(result, told),
        _licence_of_base(base, told),
        _settings(result),
        _scores(told.scores),
        _usage(result, base, repo),
        ["`run.json` holds all settings, the versions of the software, and the hashes of every input and output."],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def base_off_hub(result: Result) -> str:
    """The name of a result's base if it is no id on the Hub, else ""."""
    base = _Base(result)
    return "" if base.id else base.name


class _Base:
    """The base model of a result: as it is called, and on the Hub, "" if its name is no id there."""

    def __init__(self, result: Result) -> None:
        self.name, revision = split_revision(result.config.pinned_base)
        self.revision = revision if is_revision(revision) else ""
        known = self.name if is_hub_id(self.name) else canonical_base(self.name)
        self.id = known if is_repo(known) else ""

    @property
    def called(self) -> str:
        """The name, of a folder its last part alone: its place on this machine is nobody's business."""
        return code(self.name if self.id else PurePath(self.name).name)

    @property
    def words(self) -> str:
        """The base in a sentence."""
        if not self.name:
            return "a base that it does not name"
        at = f" at revision {code(self.revision)}" if self.revision else ""
        return (f"[{code(self.id)}](https://huggingface.co/{self.id})" if self.id else self.called) + at


def _front(result: Result, base: _Base, told: Told) -> list[str]:
    """The front matter: JSON values, which are YAML as well."""
    tags = [
        "lora",
        *(["merge"] if result.verb in _KINDS and result.parents else []),
        *([f"base_model:adapter:{base.id}"] if base.id else []),
    ]
    front: dict[str, Any] = {"library_name": "peft", "tags": tags}
    if base.id:
        front |= {"base_model": base.id, "base_model_relation": "adapter"}
    if result.config.task_type == "CAUSAL_LM":
        front["pipeline_tag"] = "text-generation"
    front |= licence_of_all([Stated(one.licence) for one in told.parents.values()])
    if datasets := [one for one in told.datasets if is_model(one)][:_MOST_DATASETS]:
        front["datasets"] = datasets
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---"]


def _made(result: Result, base: _Base) -> str:
    """One paragraph: what this is, and how it was made."""
    results = result.record["results"]
    kind, more = _KINDS.get(result.verb, ("LoRA", ""))
    said = [f"{kind} of {base.words}, rank {result.rank}{more}, made by `lora {result.verb}`."]
    if (method := _method(result)) is not None:
        paper = f" ([arXiv {method.arxiv}](https://arxiv.org/abs/{method.arxiv}))" if method.arxiv else ""
        said.append(f"`{method.name}`{paper}: {method.summary}")
    if result.verb == "extract":
        said.append("It is the low-rank part of the difference between a fine-tuned model and the base.")
    elif result.parents:
        said.append(f"It was made of {counted(len(result.parents), 'adapter')}.")
    if isinstance(energy := results.get("energy"), float):
        said.append(f"{percent(energy)} of the energy of the whole update is kept.")
    if result.verb == "train" and isinstance(n := results.get("n_train"), int):
        said.append(f"It was trained on {counted(n, 'example')}.")
    loss = results.get("loss_merged", results.get("loss"))
    if isinstance(loss, float) and isinstance(n := results.get("n_validation"), int):
        said.append(f"Validation loss on {counted(n, 'example')}: {loss:.3f}.")
    return " ".join(said)


def _method(result: Result) -> Method | None:
    """The method of a merge, or the preset of a fit."""
    settings = result.record["settings"]
    named = {"merge": (METHODS, settings.get("method")), "fit": (FIT_METHODS, settings.get("preset"))}
    folder, name = named.get(result.verb, (METHODS, None))
    return folder.methods.get(name) if isinstance(name, str) else None


def _parents(result: Result, told: Told) -> list[str]:
    if not told.parents:
        return []
    weights = result.record["settings"].get("weights")
    weights = weights if isinstance(weights, dict) else {}
    lines = ["## Parents", "", "| adapter | commit | weight | licence |", "|---|---|---|---|"]
    if result.verb == "extract":
        lines[2:] = ["| model | commit | licence |", "|---|---|---|"]
    for pinned, one in told.parents.items():
        id, _, commit = one.pinned.rpartition("@")
        weight = weights.get(pinned)
        shown = f"{weight:g}" if isinstance(weight, int | float) and abs(weight) < _LARGEST_WEIGHT else "see run.json"
        cells = [_linked(id, commit) if one.on_hub else code(id), f"`{commit}`", shown, stated(one.licence)]
        if result.verb == "extract":
            del cells[2]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _linked(id: str, commit: str) -> str:
    """An id of the Hub with a link to it at its commit."""
    place = repo_and_folder(id)
    if place is None:
        return code(id)
    repo, folder = place
    return f"[{code(id)}](https://huggingface.co/{repo}/tree/{commit}{f'/{folder}' if folder else ''})"


def _licence_of_base(base: _Base, told: Told) -> list[str]:
    known = told.base.licence
    if not known:
        return []
    built = " Built with Llama." if known.lower().startswith("llama") else ""
    return [f"Licence of the base {base.called}: {stated(known)}.{built}"]


def _settings(result: Result) -> list[str]:
    """The settings of the run, without those that are told elsewhere."""
    rows = []
    for name, value in sorted(result.record["settings"].items()):
        empty = value is None or value == "" or value == [] or value == {}
        if name not in _NOT_SHOWN and not empty:
            rows.append(f"| {code(name)} | {code(shortened(value if isinstance(value, str) else json.dumps(value)))} |")
    return (
        ["## Settings", "", f"Of `lora {result.verb}`:", "", "| setting | value |", "|---|---|", *rows] if rows else []
    )


def _scores(scores: Sequence[VersionScore]) -> list[str]:
    if not scores:
        return []
    lines = ["## Scores", "", "Measured by `lora eval`, with 95 % intervals; differences are paired.", ""]
    lines += ["| data | SHA-256 | metric | n | score | difference |", "|---|---|---|---|---|---|"]
    for one in scores:
        value, delta = f"{one.value:.3f}", ""
        if one.low is not None and one.high is not None:
            value += f" {interval(one.low, one.high)}"
        if one.delta is not None and one.delta_low is not None and one.delta_high is not None:
            ends = interval(one.delta_low, one.delta_high, signed=True)
            delta = f"{one.delta:+.3f} {ends} to {code(one.baseline)}"
        data = f"{code(one.task or 'unnamed')} | {code(one.sha256[:12])}"
        lines.append(f"| {data} | {code(one.metric)} | {one.n:,} | {value} | {delta} |")
    return lines


def _usage(result: Result, base: _Base, repo: str) -> list[str]:
    lines = ["## How to load it", ""]
    for title, language, text in _ways(result, base, repo):
        lines += [f"{title}:", "", f"```{language}", *text, "```", ""]
    return lines[:-1]


def _ways(result: Result, base: _Base, repo: str) -> Iterator[tuple[str, str, list[str]]]:
    """Title, language and lines of each way to load a result."""
    name, config = base.id or "BASE-MODEL", result.config
    loader = _CLASSES.get(config.task_type, "AutoModel")
    at = f", revision={json.dumps(base.revision)}" if base.revision else ""
    load = f"{loader}.from_pretrained({json.dumps(name)}{at})"
    yield (
        "PEFT",
        "python",
        [
            "from peft import PeftModel",
            f"from transformers import {loader}",
            "",
            f"model = {load}",
            f"model = PeftModel.from_pretrained(model, {json.dumps(repo)})",
        ],
    )
    loading = [f"from transformers import {loader}", "", f"model = {load}", f"model.load_adapter({json.dumps(repo)})"]
    yield "transformers", "python", loading
    if config.task_type != "CAUSAL_LM" or not _is_plain(result):
        return
    if _vllm_takes(result):
        model = [name, *(["--revision", base.revision] if base.revision else [])]
        yield "vLLM", "sh", [vllm.hub_line(model, repo, result.rank)]
    lines = [f"lora export gguf {repo} --base {name} -o gguf", "llama-server -m BASE.gguf --lora gguf/adapter.gguf"]
    yield "llama.cpp", "sh", lines


def _is_plain(result: Result) -> bool:
    """Whether a result is pairs of matrices of linear layers alone, which all servers read."""
    config = result.config
    return not (config.modules_to_save or config.dora or config.lora_bias or config.target_parameters)


def _vllm_takes(result: Result) -> bool:
    config = result.config
    try:
        vllm.demand_servable(conv1d=[result.pinned] if config.fan_in_fan_out else [], rank=result.rank)
    except Refused:
        return False
    return True
