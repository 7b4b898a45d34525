"""LoRA-LEGO: cluster the ranks of all adapters, keep one rank per cluster."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lora_cli.algebra.draws import uniform
from lora_cli.algebra.lowrank import LowRank, concat, numerical_rank, svd
from lora_cli.algebra.updates import Updates
from lora_cli.errors import Refused
from lora_cli.methods import Knob, method

_STARTS, _ROUNDS = 10, 300
_ORTHOGONAL = 1e-6
_NOISE = 1e3


@method("spectral")
def lego(
    updates: Updates,
    weights: Tensor,
    *,
    clusters: Annotated[int, Knob("ranks of the result; 0 takes the mean rank of the adapters", low=0)] = 0,
    gauge: Annotated[
        Literal["svd", "balanced", "raw"], Knob("how each update is cut into ranks: svd, or its own A and B")
    ] = "svd",
    seed: Annotated[int, Knob("seed of the first centroids", low=0)] = 0,
) -> LowRank:
    """Cluster the single ranks of all adapters and keep the mean of each cluster.

    Rank j of adapter i is a point x = [a_j; b_j] of in + out numbers (a "minimal semantic unit"): a row of A and a
    column of B whose product is its part of the update. k-means over the Σ r_i points, with centroids [a_c; b_c]:

        ΔW = √(r̄/k) Σ_c ν_c² b_c a_cᵀ,  ν_c = mean_{x in c} ‖x‖_∞ / ‖[a_c; b_c]‖_∞,

    where k is how many of the `clusters` have points and r̄ is the mean rank. ν undoes the shrinking of a mean
    (parameter reweighting), the root the growth of the variance with k (output reweighting).

    `gauge` selects the points. svd: √σ v and √σ u of the update's singular triplets, signed so that the largest |entry|
    of u is positive; a point's sign flips when x·c < −10⁻⁶ ‖x‖‖c‖, so distances are ‖x‖² + ‖c‖² − 2|x·c|. Only svd
    makes the result depend on the updates alone. balanced: A and B as stored, each pair scaled to ‖a_j‖ = ‖b_j‖. raw:
    as stored, √|alpha/rank| on either side, the sign with B.

    k-means starts 10 times by k-means++ (squared distances, drawn per point, so that their order does not matter) and
    runs for at most 300 rounds. An empty cluster gets the point farthest from its centroid; if all points lie on
    centroids, it stays empty. The start with the least sum of squares wins, the first among equals. More clusters than
    points are refused. One adapter at k = r comes back unchanged, and so do copies at r clusters or more; a cluster for
    every point gives √(r̄/Σ r_i) times the sum. With equal singular values, or two equally good clusterings, rounding
    decides.

    Weights: a point's weight in k-means and in both means; a negative one flips its update's sign. Only their ratios
    matter. An adapter with weight 0, or whose update is zero, is left out.

    Cost: O(R² (in + out)) once and O(R² k) a round, for R = Σ r_i; no round depends on in or out.

    Use: where the rank must stay that of one adapter and the adapters share directions. Unrelated ones average out: at
    k = r, two orthogonal adapters keep a cosine of about 0.5 each. Ten starts seldom find the best clustering of points
    that form no clusters: compare a few seeds.

    Source: Zhao et al. 2025, arXiv 2409.16167. The points, k-means and the two reweightings are the paper's. There is
    no official code. Three independent reimplementations agree on ‖·‖_∞; in √(r̄/k) two of them set r̄ to the rank of
    one adapter, as here, and one to Σ r_i, a constant factor more. r̄ for mixed ranks is our choice, and so are the
    weights, svd and balanced, which make k-means independent of the scaling and signs of A and B.
    """
    taken = [i for i, u in enumerate(updates) if weights[i] != 0 and bool(u.norm() > 0)]
    if not taken:
        return concat(updates, [0.0] * len(updates))
    cut = [_cut(updates[i], updates.scales[i], gauge).turned(float(weights[i].sign())) for i in taken]
    ranks = [len(points.a) for points in cut]
    mean_rank = sum(ranks) / len(ranks)
    k = clusters or int(mean_rank + 0.5)
    if k > sum(ranks):
        raise Refused(
            f"lego: more clusters ({k}) than ranks ({sum(ranks)})",
            hint=f"--clusters {sum(ranks)} at most, or leave it out",
        )
    a, b = torch.cat([points.a for points in cut]), torch.cat([points.b for points in cut])  # (R, in), (R, out)
    w = weights[taken].abs().repeat_interleave(torch.tensor(ranks)).to(a)
    w = w / w.sum()
    draws = [uniform(seed, updates.keys[i], 0, _STARTS * k * r) for i, r in zip(taken, ranks, strict=True)]
    races = torch.cat([one.view(_STARTS, k, r) for one, r in zip(draws, ranks, strict=True)], dim=2)
    kmeans = _KMeans(a @ a.T + b @ b.T, w, signed=gauge != "svd")
    means = kmeans.best(races.to(a))  # (k, R)
    a_mean, b_mean = means @ a, means @ b
    largest = torch.maximum(a.abs().amax(1), b.abs().amax(1))
    own = torch.maximum(a_mean.abs().amax(1), b_mean.abs().amax(1))
    nu = means.abs() @ largest / torch.where(own > 0, own, 1)
    filled = int(means.any(1).sum())
    return LowRank((b_mean * nu.square()[:, None]).T * (mean_rank / filled) ** 0.5, a_mean)


@dataclass(frozen=True, slots=True)
class _Points:
    """The ranks of one update: `a` (r, in) and `b` (r, out), the update being bᵀ a."""

    a: Tensor
    b: Tensor

    def turned(self, sign: float) -> "_Points":
        return _Points(self.a, self.b * sign)


def _cut(update: LowRank, scale: float, gauge: str) -> _Points:
    if gauge == "svd":
        spectrum = svd(update)
        r = numerical_rank(spectrum.s)
        root, u, v = spectrum.s[:r].sqrt(), spectrum.U[:, :r], spectrum.V[:, :r]
        root_signed = root * u.gather(0, u.abs().argmax(0, keepdim=True))[0].sign()
        return _Points((v * root_signed).T, (u * root_signed).T)
    a, b = update.A, update.B.T
    if gauge == "raw":
        root = a.new_tensor(abs(scale)).sqrt()
        return _Points(a * root, b / root)
    norms_a, norms_b = (torch.linalg.vector_norm(side, dim=1, keepdim=True) for side in (a, b))
    level = (norms_a * norms_b).sqrt()
    return _Points(a * level / torch.where(norms_a > 0, norms_a, 1), b * level / torch.where(norms_b > 0, norms_b, 1))


class _KMeans:
    """k-means on points known by their inner products, all starts at once.

    Args:
        gram: inner products of the R points, (R, R).
        weights: of the points, (R,).
        signed: whether x and −x are different points.
    """

    def __init__(self, gram: Tensor, weights: Tensor, *, signed: bool) -> None:
        self.gram, self.weights, self.signed = gram, weights, signed
        self.squared = gram.diagonal()
        self.noise = _NOISE * torch.finfo(gram.dtype).eps * float(self.squared.max())

    def best(self, races: Tensor) -> Tensor:
        """The means of the best clustering as mixtures of points, (k, R); those of an empty cluster are zero.

        Args:
            races: numbers in [0, 1) that decide the first centroids, (starts, k, R).
        """
        centroids = self._first(races)  # (starts, k, R)
        running = torch.ones(len(races), dtype=torch.bool, device=races.device)
        labels = torch.full((len(races), len(self.gram)), -1, device=races.device)
        turns, inertia = torch.zeros_like(races[:, 0]), torch.zeros_like(races[:, 0, 0])
        for _ in range(_ROUNDS):
            new_labels, new_turns, inertia[running] = self._assigned(centroids[running])
            moved = ((new_labels != labels[running]) | (new_turns != turns[running])).any(1)
            labels[running], turns[running] = new_labels, new_turns
            running[running.clone()] = moved
            if not moved.any():
                break
            centroids[running] = self._means(labels[running], turns[running], centroids.shape[1])
        good = inertia <= inertia.min() * (1 + torch.finfo(inertia.dtype).eps ** 0.5)
        return centroids[int(good.nonzero()[0])]

    def _first(self, races: Tensor) -> Tensor:
        """k-means++: a point is drawn by its weight times its squared distance to the nearest centroid so far."""
        starts, k, _ = races.shape
        # A point has the smallest −ln(u)/p with probability p, whatever the order of the points.
        waits = -torch.log1p(-races)
        distance = torch.ones_like(races[:, 0])
        centroids = torch.zeros_like(races)
        for c in range(k):
            chosen = (waits[:, c] / (self.weights * distance).clamp(min=torch.finfo(races.dtype).tiny)).argmin(1)
            centroids[torch.arange(starts), c, chosen] = 1
            dots = self.gram[chosen]  # (starts, R)
            apart = self.squared + self.squared[chosen, None] - 2 * (dots if self.signed else dots.abs())
            apart = torch.where(apart > self.noise, apart, 0)
            distance = apart if c == 0 else torch.minimum(distance, apart)
        return centroids

    def _assigned(self, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each point's cluster and its sign there, (starts, R) each, and the sums of squares, (starts,)."""
        dots = centroids @ self.gram  # (starts, k, R)
        squares = (dots * centroids).sum(2, keepdim=True)
        distance = self.squared + squares - 2 * (dots if self.signed else dots.abs())
        # An empty cluster has no centroid.
        distance.masked_fill_(~centroids.any(2, keepdim=True), torch.inf)
        nearest, labels = distance.min(1)
        nearest = nearest.clamp(min=0)
        inertia = nearest @ self.weights
        for start in range(len(labels)):
            self._fill(labels[start], nearest[start], centroids.shape[1])
        own = dots.gather(1, labels[:, None])[:, 0]
        lengths = self.squared.sqrt() * squares[..., 0].gather(1, labels).clamp(min=0).sqrt()
        turned = torch.zeros_like(own, dtype=torch.bool) if self.signed else own < -_ORTHOGONAL * lengths
        return labels, torch.where(turned, -1.0, 1.0).to(own), inertia

    def _fill(self, labels: Tensor, nearest: Tensor, k: int) -> None:
        """Give each empty cluster the point that is farthest from its centroid."""
        for empty in (torch.bincount(labels, minlength=k) == 0).nonzero()[:, 0]:
            farthest = nearest.argmax()
            if nearest[farthest] <= self.noise:
                return
            labels[farthest], nearest[farthest] = empty, 0

    def _means(self, labels: Tensor, turns: Tensor, k: int) -> Tensor:
        means = torch.zeros(len(labels), k, len(self.gram), dtype=turns.dtype, device=turns.device)
        means.scatter_(1, labels[:, None], (turns * self.weights)[:, None])
        mass = means.abs().sum(2, keepdim=True)
        return means / torch.where(mass > 0, mass, 1)
