"""Distances between sets of slices."""

from __future__ import annotations

import torch
from fedfactory.generative.metrics.quality import kernel_distance, random_features


def slices(count, *, blobs, seed):
    """Noise slices with this number of bright blobs."""
    rng = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(count, 1, 32, 32, generator=rng) - 0.8
    x, y = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="xy")
    for image in images:
        for _ in range(blobs):
            cx, cy = (torch.rand(2, generator=rng) * 20 + 6).tolist()
            image[0] += torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 12)
    return images


def test_the_distance_grows_with_the_difference_and_is_near_zero_for_one_source():
    real, again, different, very_different = (
        random_features(slices(200, blobs=b, seed=s)) for s, b in enumerate((1, 1, 2, 3))
    )
    same, small, large = (kernel_distance(real, other) for other in (again, different, very_different))
    assert abs(same) < 0.05 * small < small < large


def test_the_distance_is_the_unbiased_estimate_written_out():
    torch.manual_seed(0)
    x, y = torch.randn(4, 3).double(), torch.randn(5, 3).double()
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    a, b = (x - mean) / deviation, (y - mean) / deviation

    def k(u, v):
        return float((u @ v / 3 + 1) ** 3)

    expected = sum(k(a[i], a[j]) for i in range(4) for j in range(4) if i != j) / 12
    expected += sum(k(b[i], b[j]) for i in range(5) for j in range(5) if i != j) / 20
    expected -= 2 * sum(k(u, v) for u in a for v in b) / 20
    assert abs(kernel_distance(x, y) - expected) < 1e-9


def test_features_do_not_depend_on_batches_or_on_the_global_random_state():
    images = slices(7, blobs=1, seed=0)
    torch.manual_seed(1)
    first = random_features(images, batch_size=3)
    torch.manual_seed(2)
    torch.testing.assert_close(random_features(images), first)
    assert first.shape == (7, 352)
