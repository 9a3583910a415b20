"""What is recorded of the tokens of a layer, measured as particles on the sphere."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from macaron_ops.sphere.fields import SelfAttention
from macaron_ops.sphere.observers import clusters, effective_rank, inner_products, mean_product
from macaron_ops.splitting import to_sphere

from .jacobian import Spectrum

__all__ = ["LayerRecord", "joined", "measure"]


@dataclass(frozen=True)
class LayerRecord:
    """The tokens after one layer, B sequences; the first record has those before all layers, under the name "input".

    Attributes:
        name: of the layer in the model. cls: its class.
        lengths: ``(B,)``, the mean length ``|x|`` of a token.
        pairs: of different tokens of one sequence, ordered, all sequences together.
        histogram: ``(bins,)``, their shares in equal bins of [-1, 1] of the inner product of unit vectors.
        mean_product: ``(B,)``, the mean of those inner products.
        effective_rank: ``(B,)``, exp of the entropy of the singular values over their sum.
        clusters: ``(B,)``, the number of groups by leaders, and largest_cluster: ``(B,)``, the largest one's share.
        energies: for each beta ``(B,)`` numbers ``mean over pairs of exp(beta (<x, y> - 1))``, which is
            ``2 beta exp(-beta) E_beta``: from nearly 0 to 1, which is one single cluster.
        spectrum: the largest singular values ``(B, count)`` of the layer's Jacobian on the real tokens of a sequence,
            all else frozen, with their residuals; None where it was not asked for.
    """

    name: str
    cls: str
    lengths: Tensor
    pairs: int
    histogram: Tensor
    mean_product: Tensor
    effective_rank: Tensor
    clusters: Tensor
    largest_cluster: Tensor
    energies: dict[float, Tensor]
    spectrum: Spectrum | None


def measure(
    name: str,
    cls: str,
    x: Tensor,
    mask: Tensor,
    spectrum: Spectrum | None,
    *,
    betas: tuple[float, ...],
    bins: int,
    close: float,
) -> LayerRecord:
    """The record of tokens ``(B, T, D)`` of which those count where ``mask (B, T)`` is True."""
    rows = [sequence[kept].double().cpu() for sequence, kept in zip(x, mask, strict=True)]
    clouds = [to_sphere(row) for row in rows]
    pairs = torch.tensor([len(cloud) * (len(cloud) - 1) for cloud in clouds], dtype=torch.float64)
    shares = torch.stack([inner_products(cloud, bins) for cloud in clouds]).double()
    grouped = [clusters(cloud, close, most=len(cloud)) for cloud in clouds]
    energies = {beta: SelfAttention(beta, weighting="unnormalized") for beta in betas}
    scale = {beta: 2 * beta * torch.exp(torch.tensor(-beta, dtype=torch.float64)) for beta in betas}
    return LayerRecord(
        name,
        cls,
        torch.stack([row.norm(dim=-1).mean() for row in rows]),
        int(pairs.sum()),
        (pairs @ shares) / pairs.sum().clamp_min(1),
        torch.stack([mean_product(cloud) for cloud in clouds]),
        torch.stack([effective_rank(cloud) for cloud in clouds]),
        torch.stack([labels.max() + 1 for labels, _ in grouped]),
        torch.stack([masses.max() for _, masses in grouped]),
        {beta: scale[beta] * torch.stack([field.energy(c) for c in clouds]) for beta, field in energies.items()},
        spectrum,
    )


def joined(runs: Sequence[Sequence[LayerRecord]]) -> list[LayerRecord]:
    """The records of several runs of one model, as of one run with all of their sequences.

    Raises:
        ValueError: no runs, or runs that differ in their layers, betas, bins or singular values.
    """
    kinds = {tuple((r.name, tuple(r.energies), len(r.histogram), r.spectrum is None) for r in run) for run in runs}
    if len(kinds) != 1:
        raise ValueError(f"runs: expected some of the same layers and settings; got {len(kinds)} kinds")
    return [_joined(records) for records in zip(*runs, strict=True)]


def _joined(records: Sequence[LayerRecord]) -> LayerRecord:
    def cat(name: str) -> Tensor:
        return torch.cat([getattr(record, name) for record in records])

    pairs = sum(record.pairs for record in records)
    spectra = [record.spectrum for record in records if record.spectrum is not None]
    return LayerRecord(
        records[0].name,
        records[0].cls,
        cat("lengths"),
        pairs,
        sum(record.pairs * record.histogram for record in records) / max(pairs, 1),
        cat("mean_product"),
        cat("effective_rank"),
        cat("clusters"),
        cat("largest_cluster"),
        {beta: torch.cat([record.energies[beta] for record in records]) for beta in records[0].energies},
        Spectrum(*(torch.cat(parts) for parts in zip(*spectra, strict=True))) if spectra else None,
    )
