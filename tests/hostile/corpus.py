"""Hostile adapters, each a few bytes: malformed headers and configurations, and pickles that tell when they run.

`write_corpus(folder)` writes one adapter folder per case. `python -m tests.hostile.corpus FOLDER` does the same.
"""

import json
import pickle
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
GOOD_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "acme/tiny",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
}


def safetensors(header: object, body: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file: `header` as JSON, or as it stands if it is bytes or text already."""
    text = header if isinstance(header, bytes) else header if isinstance(header, str) else json.dumps(header)
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def tensor(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object) -> dict[str, object]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def good_weights(rank: int = 2, width: int = 3, out: int = 4) -> bytes:
    """One module with A (rank, width) and B (out, rank) of ones, in F32."""
    a, b = 4 * rank * width, 4 * out * rank
    header = {
        f"{MODULE}.lora_A.weight": tensor("F32", [rank, width], [0, a]),
        f"{MODULE}.lora_B.weight": tensor("F32", [out, rank], [a, a + b]),
    }
    return safetensors(header, struct.pack("<f", 1.0) * (rank * width + out * rank))


def malformed_headers() -> dict[str, bytes]:
    """Files that must raise HeaderError, by what is wrong with them."""
    one = {"a": tensor()}
    four = b"\0" * 4
    entry = json.dumps(tensor())
    good = good_weights()
    return {
        "empty file": b"",
        "seven bytes": b"\0" * 7,
        "no header": struct.pack("<Q", 0),
        "length over the file": safetensors(one, length=1000),
        "length of 2^63": safetensors(one, length=2**63),
        "length of 9 MB": safetensors(one, length=9 * 1024 * 1024) + b" " * 9 * 1024 * 1024,
        "truncated in the data": good[:-5],
        "truncated in the header": good[:40],
        "bytes after the last tensor": good + b"x",
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "a list": safetensors([]),
        "a number": safetensors("1"),
        "null": safetensors("null"),
        "not JSON": safetensors(b"{a: 1}"),
        "not UTF-8": safetensors(b'{"\xff":' + entry.encode() + b"}", four),
        "lone surrogate": safetensors('{"\\ud800":' + entry + "}", four),
        "leading space": safetensors(" " + json.dumps(one), four),
        "two objects": safetensors(json.dumps(one) + "{}", four),
        "trailing comma": safetensors('{"a":' + entry + ",}", four),
        "deep lists": safetensors('{"a":' + "[" * 200_000 + "]" * 200_000 + "}"),
        "deep objects": safetensors('{"a":' * 100_000 + "1" + "}" * 100_000),
        "entry is text": safetensors({"a": "x"}),
        "entry is null": safetensors({"a": None}),
        "entry is a list": safetensors({"a": ["F32", [1], [0, 4]]}, four),
        "entry with another key": safetensors({"a": tensor(extra=1)}, four),
        "entry without dtype": safetensors({"a": {"shape": [1], "data_offsets": [0, 4]}}, four),
        "name given twice": safetensors('{"a":' + entry + ',"a":' + entry + "}", four),
        "key given twice": safetensors('{"a":' + entry[:-1] + ',"dtype":"F32"}}', four),
        "name with a line break": safetensors({"a\nb": tensor()}, four),
        "unknown dtype": safetensors({"a": tensor("F31")}, four),
        "dtype is a number": safetensors({"a": tensor(32)}, four),
        "shape is null": safetensors({"a": tensor(shape=None)}, four),
        "negative shape": safetensors({"a": tensor(shape=[-1, -1])}, four),
        "minus zero": safetensors('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        "fractional shape": safetensors({"a": tensor(shape=[1.0])}, four),
        "NaN shape": safetensors('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', four),
        "true shape": safetensors({"a": tensor(shape=[True])}, four),
        "overflowing shape": safetensors({"a": tensor(shape=[2**40, 2**40, 0], offsets=[0, 0])}),
        "shape of 5,000 digits": safetensors(
            '{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}', four
        ),
        "fifty dimensions": safetensors({"a": tensor(shape=[1] * 50)}, four),
        "three offsets": safetensors({"a": tensor(offsets=[0, 2, 4])}, four),
        "offsets are null": safetensors({"a": tensor(offsets=None)}, four),
        "offsets backwards": safetensors({"a": tensor(offsets=[4, 0])}, four),
        "offsets negative": safetensors({"a": tensor(offsets=[-4, 0])}, four),
        "offsets beyond the file": safetensors({"a": tensor(shape=[250], offsets=[0, 1000])}, four),
        "size is not that of the shape": safetensors({"a": tensor(shape=[2])}, four),
        "hole between tensors": safetensors({"a": tensor(), "b": tensor(offsets=[8, 12])}, four * 3),
        "overlapping tensors": safetensors({"a": tensor(), "b": tensor(offsets=[0, 4])}, four),
        "hole at the start": safetensors({"a": tensor(offsets=[4, 8])}, four * 2),
        "metadata is a list": safetensors({"__metadata__": [], **one}, four),
        "metadata holds a number": safetensors({"__metadata__": {"a": 1}, **one}, four),
        "metadata twice": safetensors('{"__metadata__":{},"__metadata__":{},"a":' + entry + "}", four),
    }


def header_bombs() -> dict[str, bytes]:
    """Files whose header is large: each must be judged within 2 s and 64 MB."""
    room = 8 * 1024 * 1024 - 8

    def many(count: int) -> str:
        name = MODULE.replace("0", "{0}") + ".lora_A.weight"
        entries = (f'"{name.format(i)}":{json.dumps(tensor("U8", [1], [i, i + 1]))}' for i in range(count))
        return "{" + ",".join(entries) + "}"

    headers = {
        "a list of lists": '{"a":{"dtype":"F32","shape":[' + "[]," * (room // 3 - 20) + "[]]}}",
        "a list of numbers": '{"a":{"dtype":"F32","shape":[' + "1000," * (room // 5 - 20) + "1]}}",
        "one name without an end": '{"' + "a" * (room - 2),
        "one name of escapes": '{"' + "\\\\" * (room // 2 - 2),
        "metadata of emoji": '{"__metadata__":{"a":"' + "\U0001f600" * (room // 4 - 20) + '"}}',
        "blanks": "{" + " " * (room - 2),
        "60,000 tensors": many(60_000),
    }
    files = {name: safetensors(header) for name, header in headers.items()}
    files["as many tensors as may be"] = safetensors(many(50_000), b"\0" * 50_000)
    return files


def malformed_configs() -> dict[str, bytes]:
    """Configurations that must raise ConfigError, by what is wrong with them."""

    def with_(**changes: object) -> bytes:
        return json.dumps({**GOOD_CONFIG, **changes}).encode()

    return {
        "empty": b"",
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "a list": b"[]",
        "a number": b"1",
        "not JSON": b"{peft_type: LORA}",
        "not UTF-8": b'{"peft_type": "LORA\xff"}',
        "lone surrogate": b'{"peft_type": "LORA", "base_model_name_or_path": "\\ud800"}',
        "deep": b'{"peft_type": "LORA", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "forty levels": b'{"peft_type": "LORA", "x": ' + b"[" * 40 + b"]" * 40 + b"}",
        "two megabytes": b'{"peft_type": "LORA", "x": "' + b"a" * 2_000_000 + b'"}',
        "a number of 5,000 digits": b'{"peft_type": "LORA", "x": ' + b"9" * 5000 + b"}",
        "alpha twice": b'{"peft_type": "LORA", "lora_alpha": 1, "lora_alpha": 64}',
        "no peft_type": b'{"r": 8}',
        "peft_type is a number": with_(peft_type=7),
        "r is 0": with_(r=0),
        "r is -1": with_(r=-1),
        "r is text": with_(r="8"),
        "r is true": with_(r=True),
        "r is 8.5": with_(r=8.5),
        "alpha is NaN": with_(lora_alpha=float("nan")),
        "alpha is infinite": with_(lora_alpha=float("inf")),
        "alpha is 1e999": b'{"peft_type": "LORA", "lora_alpha": 1e999}',
        "alpha is 10^400": b'{"peft_type": "LORA", "lora_alpha": 1' + b"0" * 400 + b"}",
        "alpha is text": with_(lora_alpha="16"),
        "use_rslora is text": with_(use_rslora="false"),
        "use_dora is a number": with_(use_dora=1),
        "base is a list": with_(base_model_name_or_path=["a"]),
        "base is endless": with_(base_model_name_or_path="a" * 100_000),
        "target_modules holds numbers": with_(target_modules=[1, 2]),
        "target_modules is an object": with_(target_modules={"a": 1}),
        "rank_pattern is a list": with_(rank_pattern=[1]),
        "rank_pattern holds 0": with_(rank_pattern={"q_proj": 0}),
        "alpha_pattern holds text": with_(alpha_pattern={"q_proj": "x"}),
        "bias is null-like text in a list": with_(bias=["none"]),
    }


def code_naming_configs(canary: Path) -> dict[str, bytes]:
    """Valid configurations whose fields name code or files, as past exploits of loaders did."""
    named = "tests.hostile.payload"
    changes: dict[str, dict[str, object]] = {
        "auto_mapping": {"auto_mapping": {"parent_library": named, "base_model_class": "Model"}},
        "megatron_core": {"megatron_core": named},
        "tokenizer_kwargs": {"tokenizer_kwargs": {"trust_remote_code": True}},
        "custom code": {"trust_remote_code": True, "auto_map": {"AutoModel": f"{named}.Model"}},
        "revision": {"revision": f"../../{canary.name}"},
        "target regex": {"target_modules": "(a+)+$"},
        "exclude regex": {"exclude_modules": "((a|a)*)*b"},
    }
    return {name: json.dumps({**GOOD_CONFIG, **change}).encode() for name, change in changes.items()}


class _Touch:
    """Unpickling an instance creates the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


@dataclass(frozen=True)
class Corpus:
    """Adapter folders by name. `canary` exists as soon as anything unpickled a file of the corpus."""

    folders: dict[str, Path]
    canary: Path


def write_corpus(root: Path) -> Corpus:
    """Write every case into a folder of its own under `root`, together with a good other half."""
    canary = root / "canary"
    folders: dict[str, Path] = {}

    def folder(name: str, config: bytes | None, weights: bytes | None) -> Path:
        path = folders[name] = root / f"case-{len(folders):03d}"
        path.mkdir(parents=True)
        for file, data in (("adapter_config.json", config), ("adapter_model.safetensors", weights)):
            if data is not None:
                (path / file).write_bytes(data)
        return path

    good = json.dumps(GOOD_CONFIG).encode()
    for what, data in malformed_headers().items():
        folder(f"header: {what}", good, data)
    for what, data in {**malformed_configs(), **code_naming_configs(canary)}.items():
        folder(f"config: {what}", data, good_weights())
    bomb = pickle.dumps(_Touch(canary))
    (folder("pickle alone", good, None) / "adapter_model.bin").write_bytes(bomb)
    (folder("pickle beside a good adapter", good, good_weights()) / "adapter_model.bin").write_bytes(bomb)
    folder("pickle under the name of the weights", good, bomb)
    folder("pickle under the name of the configuration", bomb, good_weights())
    folder("nothing but a configuration", good, None)
    folder("nothing but weights", None, good_weights())
    return Corpus(folders, canary)


def _print_cases(folder: Path) -> Iterator[str]:
    for name, path in write_corpus(folder).folders.items():
        yield f"{path}\t{name}"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in _print_cases(Path(sys.argv[1])))
