"""Several adapters on one base with a router: in each module every token goes through its own shares of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.routing import Experts, Routing
from lora_cli.errors import Refused
from lora_cli.formats.reader import OpenAdapter, all_modules, shapes_of
from lora_cli.formats.skeleton import Skeleton
from lora_cli.models.apply import Term
from lora_cli.models.base_model import BaseModel
from lora_cli.models.noise import Noise, drawn, seed_of
from lora_cli.models.together import by_row
from lora_cli.records import Progress, patient, silent


@dataclass(frozen=True, eq=False)
class Router:
    """Adapters of any ranks and modules of one base, and how tokens choose among them."""

    adapters: Sequence[OpenAdapter]
    routing: Routing

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each module that any adapter has."""
        return shapes_of(self.adapters)

    @contextmanager
    def applied(
        self, base: BaseModel, *, noise: Noise | None = None, seed: int = 0, progress: Progress = silent
    ) -> Iterator[None]:
        """While the block runs, every token that passes `base` is routed through the adapters.

        Args:
            noise: noise in place of every adapter's factors, by `seed`: a control for their content.

        Raises:
            Refused: an adapter does not fit the base or its precision, or adapts something else than linear layers and
                embeddings.
        """
        for adapter in self.adapters:
            base.check({module: adapter.shape(module) for module in adapter.modules}, adapter.ref.id)
        terms, modules, report = {}, all_modules(self.adapters), patient(progress)
        for done, module in enumerate(modules, 1):
            experts = Experts.of(self._updates(module, noise, seed))
            if experts is not None:
                terms[module] = self._term(base, module, experts)
            report("loading adapters", done, len(modules))
        with base.attach({}, terms):
            yield

    def _updates(self, module: str, noise: Noise | None, seed: int) -> list[LowRank]:
        """The updates of one module, by the adapters that have it."""
        having = [adapter for adapter in self.adapters if module in adapter.modules]
        updates = [adapter.read(module) for adapter in having]
        if noise is None:
            return updates
        generator = torch.Generator().manual_seed(seed_of(seed, module))
        return drawn(noise, updates, [adapter.scales[module] for adapter in having], generator)

    def _term(self, base: BaseModel, module: str, exact: Experts) -> Term:
        """The module's output with the routed updates added."""
        demand_by_token(base.skeleton, [module])
        experts = exact.to(base.device, base.dtype)
        if not (torch.isfinite(experts.A).all() and torch.isfinite(experts.B).all()):
            raise Refused(f"{module}: an adapter's values overflow {base.dtype_name}", hint="use --dtype bf16 or fp32")
        matrix, routing = base.skeleton.get(module), self.routing
        size = getattr(base.model.get_submodule(module), "embed_scale", 1.0)

        def add(x: Tensor, y: Tensor) -> Tensor:
            projections = x.reshape(-1, x.shape[-1]) @ experts.A.T
            return y + experts.output(projections, routing).view(y.shape)

        def look_up(x: Tensor, y: Tensor) -> Tensor:
            projections = nn.functional.embedding(x.flatten(), experts.A.T)
            return y + experts.output(projections, routing).view(y.shape) * size

        return look_up if matrix is not None and matrix.kind == "embedding" else add


def demand_by_token(skeleton: Skeleton, modules: Sequence[str]) -> None:
    """Refused if a module is neither a linear layer nor an embedding: its update cannot differ from token to token."""
    for module in modules:
        if not by_row(skeleton, [module]):
            raise Refused(
                f"{module} is no linear layer or embedding, so its tokens cannot be routed",
                hint="leave out the adapters that have it",
            )
