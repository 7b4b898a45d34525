"""The memory of a fit: `python tests/bench/bench_memory.py [--accounting]` prints a table.

Without the flag: what a dry run counts for the largest step of a fit, beside the rise of the peak of a process that
makes it, for small bases of random weights; once as a user starts it, once with MALLOC_MMAP_THRESHOLD_ set, under
which glibc gives freed memory back. With the flag: the same count for 30 adapters of rank 16 on a base of 8 billion
numbers in bf16, which needs no more than a configuration.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers import LlamaConfig

from lora_cli.formats.run_record import peak_bytes
from lora_cli.models.encode import Encoded
from lora_cli.models.heap import given_back, keeps_freed_memory
from lora_cli.models.ref import load_encoder, pin
from lora_cli.precision import torch_dtype
from lora_cli.records import Example
from lora_cli.steps.memory import held_by_fit, step_of
from tests.templates import tokenizer
from tests.tiny_bases import tiny_llama

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Case(NamedTuple):
    """A base, the sum of its adapters' ranks, a step of examples of one length, and how it is made."""

    width: int
    layers: int
    vocabulary: int
    ranks: int
    batch: int
    tokens: int
    learnt: int
    dtype: str = "fp32"
    recompute: bool = False

    def __str__(self) -> str:
        base = f"{self.layers} layers of {self.width}, vocabulary {self.vocabulary:,}"
        examples = f"{self.batch} of {self.tokens + self.learnt} tokens, {self.learnt} learnt"
        how = self.dtype + (", --grad-checkpointing" if self.recompute else "")
        return f"{base} | {self.ranks} | {examples} | {how}"


CASES = (
    Case(128, 12, 2000, 64, 8, 192, 64),
    Case(128, 16, 1000, 120, 4, 568, 32),
    Case(256, 6, 4000, 128, 8, 100, 100),
    Case(192, 8, 8000, 192, 2, 750, 150),
    Case(256, 8, 4000, 128, 8, 350, 50),
    Case(256, 8, 4000, 128, 8, 350, 50, "fp32", True),
    Case(256, 8, 4000, 128, 8, 350, 50, "bf16"),
    Case(256, 8, 4000, 128, 8, 350, 50, "4bit"),
)


def said_and_risen(case: Case) -> tuple[int, int]:
    """The bytes that are counted for the values of a step with their gaps, and the rise of this process's peak.

    The rise is that over what stays when a step has ended: buffers that a machine's threads need are no part of it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_llama(
            vocab_size=case.vocabulary, hidden_size=case.width, intermediate_size=3 * case.width,
            num_hidden_layers=case.layers, num_attention_heads=case.width // 32, num_key_value_heads=case.width // 64,
            max_position_embeddings=2048,
        )  # fmt: skip
        model.save_pretrained(scratch)
        tokenizer("characters").save_pretrained(scratch)
        ref = pin(scratch, device="cpu", dtype=case.dtype)
        base, dtype = ref.load(), torch_dtype(ref.compute)
        ranks = {name: case.ranks for name in base.shapes if name.rpartition(".")[2] in KINDS}
        batch = [base.encode(Example(id="x", prompt="a" * case.tokens, completion="b" * case.learnt))] * case.batch
        held = held_by_fit(
            Path(scratch), dtype, ranks, batch,
            batch=case.batch, recompute=case.recompute, four_bit=ref.four_bit, heap=keeps_freed_memory("cpu"),
        )  # fmt: skip
    assert held is not None
    work = step_of(base, ranks, batch, case.recompute)
    with given_back():  # buffers of threads and of their libraries come with the first step, and stay
        work()
    before = psutil.Process().memory_info().rss
    for _ in range(2):
        work()
    return held["values"] + held["gaps"], peak_bytes() - before


def beside_runs() -> None:
    """Counted and measured megabytes of steps, each measured in a process of its own."""
    print("| base | ranks | examples | | counted, MB | measured | ratio | given back: counted | measured | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        cells = []
        for more in ({}, {"MALLOC_MMAP_THRESHOLD_": "131072"}):
            command = [sys.executable, __file__, "--case", json.dumps(case)]
            environment = {**os.environ, **more}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            said, peak = map(int, done.stdout.split())
            cells += [f"{said / 1e6:,.0f}", f"{peak / 1e6:,.0f}", f"{said / peak:.2f}"]
        print(f"| {case} | {' | '.join(cells)} |", flush=True)


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
    options.add_argument("--case", type=json.loads, help="the fields of one, as JSON: print its two numbers of bytes")
    given = options.parse_args()
    if given.case is not None:
        print(*said_and_risen(Case(*given.case)))
    elif given.accounting:
        accounting()
    else:
        beside_runs()
