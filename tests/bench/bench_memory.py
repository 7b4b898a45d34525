"""The memory of a fit: `python tests/bench/bench_memory.py [--accounting]` prints a table.

Without the flag: what `lora fit --dry-run` says beside the peak of real runs, each in a process of its own, for a
base of 259 MB (fp32, random weights) and 20 adapters of rank 16. With it: the same count for 30 adapters of rank 16 on
a base of 8 billion numbers in bf16, which needs no more than a configuration.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers import LlamaConfig

from lora_cli.models.encode import Encoded
from lora_cli.models.ref import load_encoder
from lora_cli.records import Example
from lora_cli.steps.memory import held_by_fit
from tests.adapters_on_disk import random_factors, write_adapter
from tests.paths import ROOT
from tests.templates import tokenizer
from tests.tiny_bases import tiny_llama

RUN = (
    "import atexit, sys\nfrom lora_cli.app import main\nfrom lora_cli.formats.run_record import peak_bytes\n"
    "atexit.register(lambda: print('peak', peak_bytes(), file=sys.stderr))\nmain()"
)
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make(folder: Path) -> None:
    """A base, a pool of 20 adapters, and a task whose examples are all of one length."""
    made = tokenizer("characters")
    model = tiny_llama(
        vocab_size=8000, hidden_size=640, intermediate_size=1728, num_hidden_layers=12, num_attention_heads=10,
        num_key_value_heads=5, max_position_embeddings=2048, eos_token_id=made.eos_token_id,
    )  # fmt: skip
    model.save_pretrained(folder / "base")
    made.save_pretrained(folder / "base")
    shapes = {
        name: tuple(module.weight.shape) for name, module in model.named_modules() if name.rpartition(".")[2] in KINDS
    }
    for place in range(20):
        factors = {name: (0.05 * b, a) for name, (b, a) in random_factors(shapes, 16, seed=place).items()}
        write_adapter(folder / "pool" / f"a{place}", factors, base="base")
    lines = [json.dumps({"prompt": "ab cd " * 40 + str(n % 10), "completion": "dc ba " * 15}) for n in range(20)]
    (folder / "task.jsonl").write_text("\n".join(lines) + "\n")


def beside_runs() -> None:
    """Said and measured megabytes of fits."""
    print("| | said, MB | measured, MB | said / measured |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "LORA_BASE": "base", "LORA_DB": str(folder / "lora.db")}

        def run(*words: str) -> tuple[str, int]:
            command = [sys.executable, "-c", RUN, *words]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=environment)
            return done.stdout, int(done.stderr.rpartition("peak ")[2])

        run("pool", "sync", "--from", "pool")
        cases = {
            "8 examples of 332 tokens": (),
            "2 examples": ("--batch", "2"),
            "8 examples, --grad-checkpointing": ("--grad-checkpointing",),
            "8 examples, bf16": ("--dtype", "bf16"),
        }
        for place, (name, words) in enumerate(cases.items()):
            fit = ("fit", "--data", "task.jsonl", "--steps", "2", *words)
            said = json.loads(run(*fit, "--dry-run", "--json")[0])["estimate"]["memory_bytes"]
            peak = run(*fit, "-o", f"out{place}")[1]
            print(f"| {name} | {said / 1e6:,.0f} | {peak / 1e6:,.0f} | {said / peak:.2f} |", flush=True)


def accounting() -> None:
    """The gigabytes of a large base, by the function that a dry run asks."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    shapes = {"k_proj": "self_attn", "v_proj": "self_attn", "q_proj": "self_attn", "o_proj": "self_attn"}
    ranks = {f"model.layers.{n}.{shapes.get(kind, 'mlp')}.{kind}": 30 * 16 for n in range(32) for kind in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        tokenizer("characters").save_pretrained(scratch)
        encoder = load_encoder(scratch)

        def example(tokens: int, learnt: int) -> Encoded:
            one = encoder.encode(Example(id="x", prompt="a" * (tokens - learnt), completion="b" * learnt))
            return one._replace(ids=one.ids[:tokens])

        print("| examples | base | adapters | values of a pass | in all, GB |\n|---|---|---|---|---|")
        for tokens, learnt in ((256, 64), (1024, 256), (2048, 512)):
            for again in (False, True):
                batch = [example(tokens, learnt)] * 8
                held = held_by_fit(Path(scratch), torch.bfloat16, ranks, batch, batch=8, recompute=again)
                assert held is not None
                parts = " | ".join(f"{held[name] / 1e9:.1f}" for name in ("base", "adapters", "values"))
                how = ", --grad-checkpointing" if again else ""
                print(f"| 8 of {tokens} tokens, {learnt} learnt{how} | {parts} | {sum(held.values()) / 1e9:.1f} |")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--accounting", action="store_true")
    if options.parse_args().accounting:
        accounting()
    else:
        beside_runs()
