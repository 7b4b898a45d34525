"""A router on a whole model equals dense weights token by token, and PEFT's own Arrow where that is right."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from torch import Tensor

from lora_cli.algebra.routing import Routing
from lora_cli.errors import Refused
from lora_cli.formats.reader import OpenAdapter
from lora_cli.models.base_model import BaseModel
from lora_cli.models.router import Router, demand_by_token
from lora_cli.recipes import FIT_METHODS, EvalOptions
from lora_cli.steps.evaluate.evaluate import System, evaluate, read_rows
from tests import architectures
from tests.adapters_on_disk import Factors, random_factors, write_adapter
from tests.tiny_bases import characters, examples, gpt2, opened, tiny_gpt2, tiny_llama

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
LAYERS = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.down_proj": (32, 48)}.items()
}
IDS = torch.randint(3, 104, (3, 11), generator=torch.Generator().manual_seed(1))
PRESETS = ("arrow", "spectr")


def decaying(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Factors:
    """Random factors whose first direction is much the strongest, so that 15 power iterations find it."""
    found = random_factors(shapes, rank, seed=seed)
    return {
        module: (torch.linalg.qr(b)[0] * 0.5 ** torch.arange(rank), torch.linalg.qr(a.T)[0].T)
        for module, (b, a) in found.items()
    }


def router(adapters: Sequence[OpenAdapter], preset: str = "arrow", **knobs: Any) -> Router:
    routing: Routing = FIT_METHODS.load(preset)(len(adapters), **knobs)
    return Router(adapters, routing)


def logits(base: BaseModel, found: Router | None = None) -> Tensor:
    with ExitStack() as stack, torch.no_grad():
        if found is not None:
            stack.enter_context(found.applied(base))
        result: Tensor = base.model(input_ids=IDS).logits
        return result


def score(preset: str, dense: Tensor, x: Tensor) -> Tensor:
    return (torch.linalg.svd(dense)[2][0] @ x).abs() if preset == "arrow" else (dense @ x).norm()


def by_hand(base: BaseModel, updates: Mapping[str, Sequence[Tensor]], preset: str) -> Tensor:
    """The logits with each token of each module routed by loops over dense updates; embeddings by one-hot inputs."""

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        name = names[module]
        x = inputs[0]
        if name == "model.embed_tokens":
            x = torch.nn.functional.one_hot(x, 104).to(output.dtype)
        added = torch.empty_like(output)
        for place in range(output.shape[0]):
            for token in range(output.shape[1]):
                one = x[place, token]
                scores = torch.stack([score(preset, dense, one) for dense in updates[name]])
                shares = scores.softmax(dim=0)
                added[place, token] = sum(
                    (share * (dense @ one) for share, dense in zip(shares, updates[name], strict=True)),
                    torch.zeros(output.shape[2], dtype=output.dtype),
                )
        return output + added

    names = {base.model.get_submodule(name): name for name in updates}
    handles = [module.register_forward_hook(hook) for module in names]
    try:
        return logits(base)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_token_is_routed_in_every_module(tmp_path: Path, preset: str) -> None:
    base = BaseModel("acme/tiny", tiny_llama().double(), characters())
    some = {module: shape for module, shape in LAYERS.items() if "q_proj" in module}
    made = [(LAYERS, 3, 6.0), (some, 1, 0.5), (dict(list(LAYERS.items())[2:]), 2, -2.0)]
    pool, updates = [], dict[str, list[Tensor]]()
    for place, (shapes, rank, alpha) in enumerate(made):
        factors = random_factors(shapes, rank, seed=place)
        pool.append(opened(write_adapter(tmp_path / f"a{place}", factors, lora_alpha=alpha)))
        for module, (b, a) in factors.items():
            updates.setdefault(module, []).append(alpha / rank * (b.double() @ a.double()))
    found = logits(base, router(pool, preset))
    torch.testing.assert_close(found, by_hand(base, updates, preset), rtol=1e-5, atol=1e-5)
    assert (found - logits(base)).abs().max() > 0.1


def test_a_router_of_one_adapter_is_that_adapter(tmp_path: Path) -> None:
    base = BaseModel("acme/tiny", tiny_llama(), characters())
    one = opened(write_adapter(tmp_path / "one", random_factors(LAYERS, 3, seed=1)))
    with base.applied({module: one.read(module) for module in one.modules}):
        alone = logits(base)
    for preset in PRESETS:
        torch.testing.assert_close(logits(base, router([one], preset)), alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(base, router([one, one, one], preset)), alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(base), base.model(input_ids=IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_embeddings_are_routed_by_their_tokens(tmp_path: Path, preset: str) -> None:
    base = BaseModel("acme/tiny", tiny_llama().double(), characters())
    pool, updates = [], dict[str, list[Tensor]]()
    for place in range(2):
        [(b, a)] = random_factors({"model.embed_tokens": (32, 104)}, 3, seed=place).values()
        named = {"model.embed_tokens.lora_embedding_A": a * 10, "model.embed_tokens.lora_embedding_B": b}
        folder = architectures.saved_adapter(tmp_path / f"a{place}", named, ["embed_tokens"], r=3, lora_alpha=3)
        pool.append(opened(folder))
        updates.setdefault("model.embed_tokens", []).append(10 * b.double() @ a.double())
    found = logits(base, router(pool, preset))
    torch.testing.assert_close(found, by_hand(base, updates, preset), rtol=1e-5, atol=1e-5)
    assert (found - logits(base)).abs().max() > 0.1


def test_a_base_that_stores_its_weights_transposed(tmp_path: Path) -> None:
    base = gpt2()
    shapes = {"transformer.h.1.attn.c_attn": (96, 32), "transformer.h.0.mlp.c_proj": (32, 128)}
    one = opened(write_adapter(tmp_path / "one", random_factors(shapes, 3, seed=1), fan_in_fan_out=True))
    with base.applied({module: one.read(module) for module in one.modules}):
        alone = logits(base)
    torch.testing.assert_close(logits(base, router([one, one])), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_generation_routes_every_new_token(tmp_path: Path, preset: str) -> None:
    base = BaseModel("acme/tiny", tiny_llama(), characters())
    pool = [opened(write_adapter(tmp_path / f"a{i}", random_factors(LAYERS, 3, seed=i))) for i in range(3)]
    found, task, new = router(pool, preset), examples(5), 6
    wanted = []
    with found.applied(base), torch.no_grad():
        for example in task:
            ids = base.prompt_ids(example.prompt)
            for _ in range(new):
                # Without a cache: the whole text is read for each token.
                best = int(base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
                if best in base.ends:
                    break
                ids = [*ids, best]
            wanted.append(base.tokenizer.decode(ids[len(base.prompt_ids(example.prompt)) :], skip_special_tokens=True))
    systems = [System(name="base"), System(name="router", updates=found, version="1")]
    alone = System(name="one", updates={module: pool[0].read(module) for module in LAYERS}, version="2")
    options = EvalOptions(metric="exact", max_new_tokens=new)
    evaluate(base, [*systems, alone], task, options, rows_path=tmp_path / "rows.jsonl")
    texts = {row.id: row.text for row in read_rows(tmp_path / "rows.jsonl") if row.system == "router"}
    assert [texts[example.id] for example in task] == wanted


def test_noise_of_one_seed_is_the_same_noise(tmp_path: Path) -> None:
    base = BaseModel("acme/tiny", tiny_llama(), characters())
    pool = [opened(write_adapter(tmp_path / f"a{i}", random_factors(LAYERS, 3, seed=i))) for i in range(2)]

    def over_noise(seed: int) -> Tensor:
        with router(pool).applied(base, noise="norm", seed=seed):
            return logits(base)

    torch.testing.assert_close(over_noise(1), over_noise(1), rtol=0, atol=0)
    assert (over_noise(1) - over_noise(2)).abs().max() > 0.01
    assert (over_noise(1) - logits(base, router(pool))).abs().max() > 0.01


@pytest.mark.parametrize(("top_k", "temperature"), [(4, 1.0), (2, 0.5), (1, 1.0)])
def test_arrow_is_that_of_peft_where_power_iterations_converge(tmp_path: Path, top_k: int, temperature: float) -> None:
    folders = [write_adapter(tmp_path / f"a{i}", decaying(LAYERS, 3, i), lora_alpha=6) for i in range(4)]
    base = BaseModel("acme/tiny", tiny_llama(), characters())
    ours = logits(base, router([opened(one) for one in folders], temperature=temperature, top_k=top_k))
    config = ArrowConfig(top_k=top_k, router_temperature=temperature)
    peft = create_arrow_model(tiny_llama(), [str(one) for one in folders], config).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours, peft(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_arrow_is_that_of_peft_on_transposed_weights(tmp_path: Path) -> None:
    shapes = {f"transformer.h.{layer}.attn.c_attn": (96, 32) for layer in range(2)}
    folders = [write_adapter(tmp_path / f"a{i}", decaying(shapes, 3, i), fan_in_fan_out=True) for i in range(2)]
    ours = logits(gpt2(), router([opened(one) for one in folders]))
    peft = create_arrow_model(tiny_gpt2(), [str(one) for one in folders], ArrowConfig(top_k=2)).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours, peft(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_peft_gives_a_share_to_an_update_of_zeros_and_this_router_none(tmp_path: Path) -> None:
    factors = [decaying(LAYERS, 3, seed) for seed in range(2)]
    still = {module: (0 * b, a) for module, (b, a) in decaying(LAYERS, 3, 2).items()}
    folders = [write_adapter(tmp_path / f"a{i}", one) for i, one in enumerate([*factors, still])]
    base = BaseModel("acme/tiny", tiny_llama(), characters())
    pool = [opened(one) for one in folders]
    torch.testing.assert_close(logits(base, router(pool)), logits(base, router(pool[:2])), rtol=1e-5, atol=1e-5)
    peft = create_arrow_model(tiny_llama(), [str(one) for one in folders], ArrowConfig(top_k=3)).eval()
    with torch.no_grad():
        assert (peft(input_ids=IDS).logits - logits(base, router(pool))).abs().max() > 0.01


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = BaseModel("acme/tiny", tiny_llama(), characters())
    wide = opened(
        write_adapter(tmp_path / "wide", random_factors({"model.layers.0.mlp.down_proj": (32, 50)}, 2, seed=0))
    )
    with pytest.raises(Refused, match="does not fit acme/tiny"), router([wide]).applied(base):
        pass
    loud = random_factors({"model.layers.0.mlp.down_proj": (32, 48)}, 2, seed=0)
    loud = {module: (1e6 * b, a) for module, (b, a) in loud.items()}
    half = BaseModel("acme/tiny", tiny_llama().half(), characters())
    adapter = opened(write_adapter(tmp_path / "loud", loud))
    with pytest.raises(Refused, match="overflow fp16"), router([adapter]).applied(half):
        pass
    for module in ("model.layers.0.mlp.experts.1.down_proj", "model.layers.0.mlp.gate"):
        with pytest.raises(Refused, match=f"{module} is no linear layer or embedding"):
            demand_by_token(architectures.skeleton("mixtral"), ["lm_head", module])
