"""A base in bf16 on a CPU: coefficients and their gradients stay in fp32."""

from pathlib import Path

import pytest
import torch

from lora_cli.algebra.lowrank import LowRank
from lora_cli.fit_methods.adaptive import adaptive
from lora_cli.models.mixture import Mixture
from lora_cli.models.ref import load
from tests.adapters_on_disk import write_adapter
from tests.tiny_bases import examples, opened, saved

Q = "model.layers.0.self_attn.q_proj"
pytestmark = pytest.mark.usefixtures("one_thread")


def test_coefficients_and_gradients_are_fp32_over_a_base_in_bf16(tmp_path: Path) -> None:
    base = load(str(saved(tmp_path / "base")), device="cpu", dtype="bf16")
    generator = torch.Generator().manual_seed(0)
    one = LowRank(torch.randn(32, 4, generator=generator), torch.randn(4, 32, generator=generator))
    write_adapter(tmp_path / "one", {Q: (one.B, one.A)}, base="base")
    mixture = Mixture(base, [opened(tmp_path / "one")], adaptive(1).parameters)
    with torch.no_grad():
        mixture.theta.fill_(0.5)
    exact = load(str(tmp_path / "base"), device="cpu", dtype="fp32")
    twin = Mixture(exact, [opened(tmp_path / "one")], adaptive(1).parameters)
    with torch.no_grad():
        twin.theta.fill_(0.5)
    found = []
    for model, mixed in ((base, mixture), (exact, twin)):
        with mixed.applied(model):
            model.completion_losses(model.encode_all(examples(8))).sum().backward()
        assert mixed.theta.dtype == torch.float32
        assert mixed.theta.grad is not None
        assert mixed.theta.grad.dtype == torch.float32
        found.append(mixed.theta.grad)
    assert base.dtype == torch.bfloat16
    torch.testing.assert_close(found[0], found[1], rtol=0.1, atol=0.05 * float(found[1].abs().max()))
