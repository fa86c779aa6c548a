"""Tree filters and the multi-scale recursive tree energy: labels spread along paths of small differences.

Song et al. 2019 (learnable tree filter), Liang et al. 2022 (tree energy loss), FedICRA (arXiv 2304.05635).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .spanning_trees import Forest, spanning_forest

SIGMA_IMAGE = 0.02  # as published: divides squared differences of three intensities in [0, 1]
COLOURS = 3  # to which that scale belongs: the published program repeats a grey image in three channels


def tree_filter(values: Tensor, guide: Tensor, forest: Forest, *, sigma: float = 1.0) -> Tensor:
    """y_i = sum_j s_ij p_j / sum_j s_ij with s_ij = exp(-sum over the path's edges of |f_a - f_b|^2 / sigma).

    Exact, by a sweep from the leaves and a sweep from the root. A sweep is a linear recurrence along parents. Jumping
    to the parent's parent, then four edges up, eight and so on, it takes log2(depth) steps over all pixels instead of
    a step per level, in plain PyTorch and differentiable in values and guide.

    Args:
        values: p, (B, C, H, W).
        guide: f, (B, K, H, W).
        forest: of this batch, see `spanning_forest`.
        sigma: scale of the squared differences.

    Returns: y, (B, C, H, W).
    """
    batch, classes, height, width = values.shape
    x = torch.cat([values, torch.ones_like(values[:, :1])], 1).movedim(1, -1).reshape(-1, classes + 1)
    features = guide.movedim(1, -1).reshape(-1, guide.shape[1])
    parent = forest.parent
    own = torch.arange(len(parent), device=parent.device)
    step = torch.exp(-(features - features[parent]).square().sum(1, keepdim=True) / sigma)
    step = torch.where((parent == own)[:, None], 0.0, step)
    jumps = _jumps(step, forest)
    below = _from_leaves(x, jumps)
    whole = _from_root((1 - step.square()) * below, jumps)
    filtered = whole[:, :-1] / whole[:, -1:]
    return filtered.reshape(batch, height, width, classes).movedim(-1, 1)


def tree_energy(
    probabilities: Tensor, images: Tensor, unknown: Tensor, *, embeddings: Sequence[Tensor], sigma: float = SIGMA_IMAGE
) -> Tensor:
    """Mean distance, over pixels of uncertain class, of predictions to themselves after a chain of tree filters:
    first along the image's tree, then along the trees of learnt embeddings.

    Args:
        probabilities: (B, C, H, W), summing to one over C.
        images: (B, K, H, W) in [0, 1].
        unknown: (B, H, W) bool, pixels whose labels do not tell a single class.
        embeddings: (B, K, H, W) each, coarse to fine; they receive gradients. Empty for the image's tree alone.
        sigma: scale of squared differences of intensities, summed over three channels; the sum over another number of
            channels counts as if it were over three, so that a grey image and its copy in colour have one energy.

    Returns: sum over unknown pixels and classes of |p - y| / number of unknown pixels; 0 if there are none.
    """
    scale = sigma * images.shape[1] / COLOURS
    filtered = tree_filter(probabilities, images.detach(), spanning_forest(images), sigma=scale)
    for guide in embeddings:
        filtered = tree_filter(filtered, guide, spanning_forest(guide))
    distance = (probabilities - filtered).abs().sum(1)
    return torch.where(unknown, distance, 0.0).sum() / unknown.sum().clamp(min=1)


def _jumps(step: Tensor, forest: Forest) -> list[tuple[Tensor, Tensor]]:
    """Weights (n, 1) and ends (n,) of the paths of 1, 2, 4 ... edges up, for the weights `step` (n, 1) of single edges;
    a path past the root weighs 0."""
    jumps, parent, length = [], forest.parent, 1
    while length <= forest.depth:
        jumps.append((step, parent))
        step, parent, length = step * step[parent], parent[parent], 2 * length
    return jumps


def _from_root(x: Tensor, jumps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """z (n, C) of z_i = x_i + w_i z_parent(i), for x (n, C)."""
    for weight, ancestor in jumps:
        x = x + weight * x[ancestor]
    return x


def _from_leaves(x: Tensor, jumps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """a (n, C) of a_i = x_i + sum over children c of w_c a_c, for x (n, C)."""
    for weight, ancestor in jumps:
        x = x.index_add(0, ancestor, weight * x)
    return x
