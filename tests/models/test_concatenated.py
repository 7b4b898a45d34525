"""A module's update by tokens through the factors, and by a weight made for a pass: one value, one gradient."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lora_cli.models.apply import applied
from lora_cli.models.concatenated import Block, added

OUT, INTO, RANK = 5, 4, 3
C = torch.tensor([0.5, -1.25, 2.0], dtype=torch.float64)


def block(rank: int = RANK, dtype: torch.dtype = torch.float64) -> Block:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, INTO), (OUT, rank)))
    return Block(a.to(dtype), b.to(dtype), ((0, rank),))


@contextmanager
def layer(one: Block, c: Tensor) -> Iterator[nn.Sequential]:
    """A model of one linear layer, through the block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INTO, OUT)).to(one.a.dtype).requires_grad_(False)
    term, weight = added(one, lambda: c, model[0])
    with applied(model, {"0": term}, {}, weights={"0": weight}):
        yield model


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("shape", [(INTO,), (2, 7, INTO)])
def test_both_ways_give_the_dense_output_and_gradients(
    monkeypatch: pytest.MonkeyPatch, merged: bool, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(Block, "takes_merged", lambda self, tokens: merged)
    one, c = block(), C.clone().requires_grad_()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    probe = torch.randn(*shape[:-1], OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with layer(one, c) as model:
        own = model[0].weight
        found = model(x)
        assert model[0].weight is own
        found.backward(probe)
    dense_c, dense_x = C.clone().requires_grad_(), x.detach().clone().requires_grad_()
    whole = own + sum(dense_c[r] * torch.outer(one.b[:, r], one.a[r]) for r in range(RANK))
    expected = torch.einsum("oi,...i->...o", whole, dense_x) + model[0].bias
    expected.backward(probe)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(c.grad, dense_c.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, dense_x.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("merged", [False, True])
def test_coefficients_of_zero_change_no_bit(monkeypatch: pytest.MonkeyPatch, merged: bool) -> None:
    monkeypatch.setattr(Block, "takes_merged", lambda self, tokens: merged)
    x = torch.randn(6, INTO, generator=torch.Generator().manual_seed(2))
    with layer(block(dtype=torch.float32), torch.zeros(RANK)) as model:
        through = model(x)
    assert torch.equal(through, model(x))


def test_what_takes_fewer_products_is_taken() -> None:
    def wide(width: int, rank: int, dtype: torch.dtype = torch.float32) -> Block:
        a, b = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((rank, width), (width, rank)))
        return Block(a, b, ())

    assert wide(96, 240).takes_merged(112)  # the demo's size: 30 adapters of rank 8
    assert not wide(96, 240).takes_merged(40)
    assert not wide(96, 240, torch.bfloat16).takes_merged(112)
    assert not wide(4096, 480).takes_merged(2048)
    learnt = wide(96, 240)
    assert not Block(learnt.a, learnt.b, (), torch.empty(240)).takes_merged(112)


def test_only_a_plain_linear_layer_gets_another_weight() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.ones(100, INTO)
    for module, makes in ((nn.Linear(INTO, OUT), True), (Doubled(INTO, OUT), False)):
        _, weight = added(block(12, torch.float32), lambda: torch.ones(12), module)
        assert (weight(x) is not None) == makes
    half = nn.Linear(INTO, OUT, dtype=torch.bfloat16)
    assert added(block(12, torch.float32), lambda: torch.ones(12), half)[1](x) is None


def test_an_error_inside_the_layer_leaves_its_own_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "takes_merged", lambda self, tokens: True)
    with layer(block(), C) as model:
        own = model[0].weight
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.ones(3, INTO + 1, dtype=torch.float64))
        assert model[0].weight is own
        assert model(torch.ones(3, INTO, dtype=torch.float64)).shape == (3, OUT)
