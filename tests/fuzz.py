"""Bytes of strangers against the readers of files: each takes them, or refuses them in one line.

python -m tests.fuzz READER [SECONDS]     searches by coverage with atheris, which must be installed; prints the number
                                          of inputs, the slowest one and the memory. Without arguments: the readers
"""

import json
import os
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lora_cli.errors import LoraError


class Reader(NamedTuple):
    """A function of bytes that may raise a LoraError and nothing else, and inputs that it takes."""

    read: Callable[[bytes], object]
    seeds: Sequence[bytes]


@cache
def folder() -> Path:
    """A folder for readers that take a file."""
    return Path(tempfile.mkdtemp(prefix="lora-fuzz-"))


def of_file(read: Callable[[Path], object], name: str, *, in_folder: bool = False) -> Callable[[bytes], object]:
    """`read` as a function of the bytes of a file, or of the folder that holds it."""

    def function(data: bytes) -> object:
        file = folder() / name
        file.write_bytes(data)
        return read(file.parent if in_folder else file)

    return function


def _header(data: bytes) -> object:
    from lora_cli.formats.header import parse_header

    return parse_header(data, len(data))


def _config(data: bytes) -> object:
    from lora_cli.formats.config import parse_config

    return parse_config(data)


def _listing(data: bytes) -> object:
    from lora_cli.hub.listing import listed

    try:
        items = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return [listed(item) for item in items] if isinstance(items, list) else listed(items)


def _card(data: bytes) -> object:
    from lora_cli.formats.card import licence_of

    return licence_of(data.decode("utf-8", "replace"))


def _task(path: Path) -> object:
    from lora_cli.task import load_task

    return load_task(path)


def _lock(path: Path) -> object:
    from lora_cli.steps.merge.lock import read_lock

    return read_lock(path)


def _record(path: Path) -> object:
    from lora_cli.formats.run_record import read_record

    return read_record(path)


def _coefficients(path: Path) -> object:
    from lora_cli.formats.coefficients import read_coefficients

    return read_coefficients(path)


def _rows(path: Path) -> object:
    from lora_cli.steps.evaluate.evaluate import read_rows

    return read_rows(path)


def _safetensors() -> bytes:
    tensor = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}
    text = json.dumps({"__metadata__": {"format": "pt"}, "a.lora_A.weight": tensor}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


def _text(*values: object) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


_CONFIG = {
    "peft_type": "LORA", "base_model_name_or_path": "acme/tiny", "r": 8, "lora_alpha": 16.0, "bias": "none",
    "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}, "layers_to_transform": [0], "use_rslora": True,
}  # fmt: skip
_LISTED = {
    "id": "alice/sql", "sha": "0" * 40, "author": "alice", "downloads": 5, "gated": "auto", "tags": ["license:mit"],
    "cardData": {"license": "mit", "base_model": ["acme/tiny"]}, "siblings": [{"rfilename": "README.md"}],
}  # fmt: skip
_RUN = {
    "schema": "lora.run/1", "key": "0" * 64, "command": "merge", "device": "cpu", "inputs": {}, "results": {},
    "outputs": {"adapter_config.json": "0"},
    "settings": {
        "base": "acme/tiny", "coefficients": None, "compact": False, "dense": False, "device": "cpu", "dtype": "auto",
        "energy": None, "for": None, "knobs": {"per": "module"}, "lambda": 1.0, "method": "norm-matched",
        "missing": "zero", "norm_match": False, "rank": "auto", "saved_modules": "refuse", "scope": [],
        "weights": {"a@0": 0.5},
    },
    "merge.lock": {"parents": {"a@0": {"sha256": "0", "source": "folder", "path": "a"}}, "versions": {"torch": "2"}},
}  # fmt: skip
_COEFFICIENTS = {
    "schema": "lora.coefficients/1", "granularity": "module", "activation": "linear", "task_sha256": "0", "base": "b",
    "adapters": ["a@0"], "values": {"model.layers.0.q_proj": [[0.5]]},
}  # fmt: skip
_ROW = {"system": "base", "id": "1", "key": "0", "log_likelihood": -1.5, "value": 0.0, "text": "a", "tokens": 1}

READERS: Mapping[str, Reader] = {
    "header": Reader(_header, [_safetensors()]),
    "config": Reader(_config, [_text(_CONFIG)]),
    "listing": Reader(_listing, [_text([_LISTED])]),
    "card": Reader(_card, [b"---\nlicense: other\nlicense_name: 'mit'\n---\n# A card\n"]),
    "task": Reader(
        of_file(_task, "task.jsonl"),
        [
            _text(
                {"prompt": "a", "completion": "b"}, {"id": "2", "prompt": "c", "completion": "d", "choices": ["d", "e"]}
            ),
            _text({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ],
    ),
    "lock": Reader(of_file(_lock, "run.json"), [_text(_RUN)]),
    "record": Reader(of_file(_record, "run.json", in_folder=True), [_text(_RUN)]),
    "coefficients": Reader(of_file(_coefficients, "coefficients.json"), [_text(_COEFFICIENTS)]),
    "rows": Reader(of_file(_rows, "scores.jsonl"), [_text({**_ROW, "seconds": 0.1}, {**_ROW, "text": None})]),
}


def judge(reader: Reader, data: bytes) -> bool:
    """Whether a reader takes the bytes. Any exception but a LoraError of one line comes out."""
    try:
        reader.read(data)
    except LoraError as error:
        if not error.message or "\n" in error.message:
            raise ValueError(f"a message that is not one line: {error.message!r}") from error
        return False
    return True


def main(name: str = "", seconds: str = "60") -> None:
    """Search for an input that a reader does not expect, for so many seconds; print the figures."""
    if not name:
        print(*READERS)
        return
    import atheris

    with atheris.instrument_imports(include=["lora_cli", "json"]):
        for seed in READERS[name].seeds:
            judge(READERS[name], seed)
    reader, figures = READERS[name], {"inputs": 0, "taken": 0, "slowest": 0.0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def one(data: bytes) -> None:
        began = time.perf_counter()
        figures["taken"] += judge(reader, data)
        figures["inputs"] += 1
        figures["slowest"] = max(figures["slowest"], time.perf_counter() - began)
        if began > end:
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            print(
                f"{name}: {figures['inputs']:,} inputs, {figures['taken']:,} taken, the slowest in "
                f"{figures['slowest'] * 1e3:.1f} ms, {grown:.0f} MiB more memory",
                flush=True,
            )
            os._exit(0)

    corpus = folder() / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(reader.seeds):
        (corpus / str(number)).write_bytes(seed)
    end = time.perf_counter() + float(seconds)
    atheris.Setup([sys.argv[0], str(corpus), "-max_len=4096", "-verbosity=0", f"-artifact_prefix={folder()}/"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
