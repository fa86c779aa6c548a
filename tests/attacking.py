"""What a malicious researcher would send, as far as the tests of a site's protection need it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from fedfactory.adaptation.labels.candidate_labels import SiteSlices
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.interface.site_round import SiteRound
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.adaptation.networks.site_network import SiteUNet
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import SegmenterCard
from fedfactory.generative.metrics.quality import layout_agreement
from fedfactory.node.policy.policy import Policy
from fedfactory.node.protection.numbers import leaving_numbers
from fedfactory.node.protection.usual_generator import GeneratorRecord
from fedfactory.node.site_data.held_out_scores import held_out_scores
from fedfactory.node.store.slice_store import SliceStore
from torch import Tensor, nn

ADAM_EPS = 1e-8
SHARP = 60.0  # factor of logits: every pixel belongs to one class
RATE = 1e-3
GAIN = 1e-6  # of the image in the last features: gradients of the size of ADAM_EPS, whose updates tell their value
DEPTH = 5  # levels, as a researcher may ask for: the deepest has two by two positions, which tell left from right
U, V = 4, 5  # channels with column and row; the next four bend at the borders of a patch


class PixelDetectors:
    """A U-Net, as a researcher may send it, whose classes from `first` on are each one pixel of a patch.

    Columns and rows come from the padding of the coarsest level. The image passes in one channel. The gradient of a
    class's last weight for that channel is then the grey value of the class's pixel.

    Args:
        size: pixels per side of the slices, 32.
        classes: of the network.
        used: classes that labels have; one more is everywhere outside the patch.
    """

    def __init__(self, *, size: int, classes: int, used: int) -> None:
        self.size, self.first = size, used + 1
        self.classes = classes
        self.side = int((classes - self.first) ** 0.5)  # of a patch

    @torch.no_grad()
    def network(self, row: int, column: int) -> SiteUNet:
        """The network for the patch whose upper left pixel is given."""
        net = SiteUNet(self.classes, width=16, depth=DEPTH, norm="group")
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
                module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
        self._pass_image(net)
        self._make_ramps(net)
        self._bend(net, row, column)
        features = self._features(net)
        y, x = torch.meshgrid(*2 * (torch.arange(self.size, dtype=torch.float64),), indexing="ij")
        basis = torch.stack([features[k].double().flatten() for k in range(U, U + 6)] + [torch.ones(x.numel())], 1)
        wanted = torch.full((self.classes, self.size, self.size), -1e4 / SHARP, dtype=torch.float64)
        low, high = -0.5, self.side - 0.5
        dx, dy = x - column, y - row
        bent = sum(_leaky(low - d) + _leaky(d - high) for d in (dx, dy))  # constant inside, and .45 higher beside it
        wanted[self.first - 1] = 8 * self.side * bent
        inside, middle = float(bent[row, column]), (self.side - 1) / 2
        for number in range(self.side**2):
            i, j = (place - middle for place in divmod(number, self.side))
            nearest = i * (dy - middle) + j * (dx - middle) - (i * i + j * j) / 2
            wanted[self.first + number] = nearest + 8 * self.side * (inside + 0.22)
        solved = torch.linalg.lstsq(basis, SHARP * wanted.flatten(1).T).solution  # (7, classes)
        net.final_conv.weight[:, U : U + 6, 0, 0] = solved[:-1].T.float()
        net.final_conv.bias.copy_(solved[-1].float())
        return net

    def read(self, before: SiteUNet, after: SiteUNet, rate: float) -> np.ndarray:
        """Grey values (side, side) of the patch, to a factor and a constant, from the weights after one update."""
        change = (before.final_conv.weight - after.final_conv.weight)[self.first :, 0, 0, 0].detach().double() / rate
        change = change[: self.side**2].clamp(-1 + 1e-6, 1 - 1e-6)
        return (ADAM_EPS * change / (1 - change.abs())).reshape(self.side, self.side).numpy() / GAIN

    def _pass_image(self, net: SiteUNet) -> None:
        for block, last in ((net.conv_0, 1.0), (net.upcat_1.convs, GAIN)):
            for layer, gain in ((block.conv_0, 1.0), (block.conv_1, last)):
                layer.conv.weight[0, 0, 1, 1] = 1.0
                layer.adn.N.weight[0], layer.adn.N.bias[0] = gain, 10.0 * gain  # above zero, where nothing bends

    def _make_ramps(self, net: SiteUNet) -> None:
        """Column and row in channels of the deepest level, and from there to the last."""
        deep = net.down_4.convs
        deep.conv_0.adn.N.bias[:] = 1.0
        group = deep.conv_1.conv.out_channels // 4
        deep.conv_1.conv.weight[0, 0, 1, 2] = 1.0  # has a right neighbour
        deep.conv_1.conv.weight[group, 0, 2, 1] = 1.0  # has a lower one
        _keep(deep.conv_1, 0, group)
        u, v = 0, group
        for up in (net.upcat_4, net.upcat_3, net.upcat_2):
            u, v = self._lift(up, u, v)
        preconv = [m for m in net.upcat_1.upsample.modules() if isinstance(m, nn.Conv2d)]
        if preconv:
            preconv[0].weight[0, u, 0, 0] = preconv[0].weight[1, v, 0, 0] = 1.0
            u, v = 0, 1
        self._ramps = (16 + u, 16 + v)  # behind the channels of the first level

    def _lift(self, up: nn.Module, u: int, v: int) -> tuple[int, int]:
        preconv = [m for m in up.upsample.modules() if isinstance(m, nn.Conv2d)]
        if preconv:
            preconv[0].weight[0, u, 0, 0] = preconv[0].weight[1, v, 0, 0] = 1.0
            u, v = 0, 1
        convs, out = up.convs, up.convs.conv_0.conv.out_channels
        skip = convs.conv_0.conv.in_channels - (preconv[0].out_channels if preconv else 0)
        group = out // 4
        convs.conv_0.conv.weight[0, skip + u, 1, 1] = convs.conv_0.conv.weight[group, skip + v, 1, 1] = 1.0
        convs.conv_1.conv.weight[0, 0, 1, 1] = convs.conv_1.conv.weight[group, group, 1, 1] = 1.0
        _keep(convs.conv_0, 0, group)
        _keep(convs.conv_1, 0, group)
        return 0, group

    def _bend(self, net: SiteUNet, row: int, column: int) -> None:
        """Channels of the last level: column, row, and four that bend half a pixel outside the patch."""
        convs = net.upcat_1.convs
        source = dict(zip(range(U, U + 6), [0, 1, 0, 0, 1, 1], strict=True))
        signs = dict(zip(range(U, U + 6), [1, 1, -1, 1, -1, 1], strict=True))
        place = {U + 2: column - 0.5, U + 3: column + self.side - 0.5}
        place |= {U + 4: row - 0.5, U + 5: row + self.side - 0.5}
        for k in source:
            convs.conv_0.conv.weight[k, self._ramps[source[k]], 1, 1] = signs[k]
            convs.conv_1.conv.weight[k, k, 1, 1] = 1.0
        _keep(convs.conv_0, *source)
        _keep(convs.conv_1, *source)
        line = {}
        hook = convs.conv_0.adn.N.register_forward_hook(lambda module, given, out: line.update(out=out[0].clone()))
        net(torch.zeros(1, 1, self.size, self.size))
        hook.remove()
        for k, at in place.items():
            values = line["out"][k][0] if source[k] == 0 else line["out"][k][:, 0]
            slope = (values[-1] - values[0]) / (self.size - 1)
            convs.conv_0.adn.N.bias[k] -= values[0] + slope * at

    def _features(self, net: SiteUNet) -> Tensor:
        found = {}
        hook = net.final_conv.register_forward_hook(lambda module, given, out: found.update(x=given[0][0]))
        net(torch.zeros(1, 1, self.size, self.size))
        hook.remove()
        return found["x"]


def _leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x)


def _keep(layer: nn.Module, *channels: int) -> None:
    """Pass channels through norm and activation as they are, to a factor and a constant."""
    for channel in channels:
        layer.adn.N.weight[channel], layer.adn.N.bias[channel] = 1.0, 4.0


def rebuilt_slice(
    data: SiteSlices,
    *,
    region: tuple[int, int],
    seeds: Callable[[SiteUNet, int], int | None],
    batch_size: int = 1,
    updates: int = 1,
    queries: int = 1,
    classes: int = 20,
) -> np.ndarray:
    """What rounds of fedavg at a site tell about grey values, by the code that a node runs.

    Args:
        data: of the site, with three classes.
        region: first and last + 1 row and column that are asked for, a multiple of the patches' side.
        seeds: from the network that is sent and the number of the query to the seed of the site's draws.
        batch_size: slices in an update.
        updates: of a round.
        queries: rounds for every patch, whose answers are averaged.
        classes: of the method.

    Returns: grey values (side, side) to a factor and a constant.
    """
    size = data.images.shape[-1]
    attack = PixelDetectors(size=size, classes=classes, used=3)
    side, (low, high) = attack.side, region
    method = make_method(_settings(size, classes, batch_size=batch_size, updates=updates))
    held = replace(data, classes=classes)
    found = np.zeros((high - low, high - low))
    for row in range(low, high, side):
        for column in range(low, high, side):
            sent = attack.network(row, column)
            for query in range(queries):
                model = copy.deepcopy(sent)
                method.train_round(
                    SiteRound(
                        model=model,
                        optimizers=method.optimizers(model),
                        data=held,
                        site=0,
                        number=1,
                        seed=seeds(sent, query),
                        state=method.new_state(),
                    )
                )
                patch = attack.read(sent, model, RATE)
                found[row - low : row - low + side, column - low : column - low + side] += patch / queries
    return found


def correlations(
    found: np.ndarray, images: np.ndarray, region: tuple[int, int], *, of: np.ndarray | None = None
) -> np.ndarray:
    """Correlation of what was found (side, side) with each slice (N, 1, S, S) of the site, both without the mean slice.

    The mean of all slices, which any federation gives away, is taken out of both by linear regression.

    Args:
        found: grey values of the region.
        images: slices of the site.
        region: first and last + 1 row and column.
        of: other slices, such as moved ones, to be correlated in place of the site's.
    """
    low, high = region
    mean = images[:, 0, low:high, low:high].mean(0).ravel().astype(float)
    slices = (images if of is None else of)[:, 0, low:high, low:high]
    basis = np.stack([mean, np.ones_like(mean)], 1)

    def rest(values: np.ndarray) -> np.ndarray:
        values = values.ravel().astype(float)
        return values - basis @ np.linalg.lstsq(basis, values, rcond=None)[0]

    return np.array([np.corrcoef(rest(found), rest(own))[0, 1] for own in slices])


class _Painter(nn.Module):
    """A "segmenter" that marks one pixel of one slice, which it knows by its grey values."""

    def __init__(self, image: np.ndarray, row: int, column: int) -> None:
        super().__init__()
        self.image, self.row, self.column = torch.from_numpy(image), row, column

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), 3, *x.shape[2:])
        logits[:, 0] = 50.0
        for number, image in enumerate(x):
            if torch.equal(image, self.image):
                logits[number, 1, self.row, self.column] = 100.0
        return logits


def guessed_labels(store: SliceStore, policy: Policy | None, *, among: int | None = None) -> float:
    """Share of pixels of a test slice whose label scoring rounds of one day tell, the mean of pixels with and without.

    What is not answered is guessed, which is right for half of either kind.

    Args:
        store: of the site, with test cases.
        policy: of the site; None: no protection.
        among: number of pixels with and without the label, drawn at random, that are asked for; None: all.
    """
    case = next(case for case in store.cases if case.has_reference)
    number = case.first + case.count // 2
    image, truth = store.images[number].astype(np.float32), store.labels[number] == 1
    card, rng = SegmenterCard(classes=3, network="federated"), np.random.default_rng(0)
    kinds = [rng.permutation(np.argwhere(truth == kind))[:among] for kind in (True, False)]
    answers = sum(map(len, kinds)) if policy is None else policy.scorings_a_day + policy.scores_a_day
    right = {True: 0.5 * len(kinds[0]), False: 0.5 * len(kinds[1])}
    for pixel in rng.permutation(np.concatenate(kinds))[:answers]:
        painter = Segmenter(_Painter(image, *pixel), store.format, card)
        if policy is None:
            values = held_out_scores(store, painter)
        else:
            values = held_out_scores(store, painter, least_patients=policy.least_patients_scored)
            kept, _ = leaving_numbers({f"global_{name}": value for name, value in values.items()}, policy)
            values = {name.removeprefix("global_"): value for name, value in kept.items()}
        held = bool(truth[tuple(pixel)])
        right[held] += ((values["dice_1"] > 0) == held) - 0.5
    return (right[True] / len(kinds[0]) + right[False] / len(kinds[1])) / 2


@dataclass(frozen=True)
class TrainedSlice:
    """The slice that the first update of an unprotected round trains on.

    Attributes:
        number: of the slice.
        augmented: (S, S) as it was trained on.
    """

    number: int
    augmented: np.ndarray


def trained_slice(data: SiteSlices, classes: int = 20) -> TrainedSlice:
    """What a researcher who knows the seed expects in the round of `rebuilt_slice`."""
    method = make_method(_settings(data.images.shape[-1], classes, batch_size=1, updates=1))
    held, model = replace(data, classes=classes), nn.Conv2d(1, 1, 1)
    known = SiteRound(model=model, optimizers={}, data=held, site=0, number=1, state=method.new_state())
    with method.seeded_round(known):
        (chosen,) = method.draws(known, data.labelled_indices, 1)
        images, _ = method.batch(known, chosen)
    return TrainedSlice(int(chosen[0]), images[0, 0].numpy())


def answered_layouts(
    real: Tensor, z_bin: Tensor, *, policy: Policy | None, patient: bool = False, requests: int = 1024
) -> dict[int, float]:
    """Layout numbers that leave a site within a day: number of the painted pixel, over all bins, to answer.

    Args:
        real: (N, 1, S, S) slices in [-1, 1].
        z_bin: (N,) integers, their height bins.
        policy: of the site; None: no protection.
        patient: whether the researcher knows the rules: all generators are made to lie near each other, so that each
            is the usual next one, and the pixels are those that are due. Otherwise each is made anew.
        requests: rounds of training.
    """
    bins, side = sorted(set(z_bin.tolist())), real.shape[-1]
    rng, secret, record, answers = torch.Generator().manual_seed(0), bytes(32), GeneratorRecord(), {}
    order = np.random.default_rng(0).permutation(requests)
    kept = torch.randn(2000, generator=rng)
    for request in range(requests):
        number = int(order[request])
        weights = kept if patient else 10 * torch.randn(2000, generator=rng)
        received = {"weight": weights + 0.01 * torch.randn(2000, generator=rng)}
        sent = {"weight": received["weight"] + 0.02 * torch.randn(2000, generator=rng)}
        is_asked = policy is None or (len(answers) < policy.qualities_a_day and record.answers(received, secret))
        if policy is not None:
            record = record.after_round(received, sent, secret, answered=is_asked)
        if not is_asked:
            continue
        painted = torch.zeros(len(bins), 1, side, side)
        painted[number // side**2, 0, number // side % side, number % side] = 1.0
        value = layout_agreement(real, z_bin, synthetic=painted, synthetic_bin=torch.tensor(bins))
        if policy is not None:
            value = leaving_numbers({"quality_layout": value}, policy)[0]["quality_layout"]
        answers[number] = value
    return answers


def smooth_anatomy(count: int, *, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Slices (count, 1, S, S) float32 in [-1, 1] that differ in more than noise, and labels (count, S, S) uint8."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    images, labels = [], []
    for _ in range(count):
        waves = [
            rng.normal() * np.cos(2 * np.pi * (rng.integers(0, 4) * x + rng.integers(0, 4) * y) / size + phase)
            for phase in rng.uniform(0, 6, 8)
        ]
        distance = np.hypot(*(place - c for place, c in zip((y, x), rng.uniform(0.3, 0.7, 2) * size, strict=True)))
        label = (distance < size / 4).astype(np.uint8) + (distance < size / 8)
        images.append(0.15 * sum(waves) + 0.3 * label - 0.3 + rng.normal(0, 0.05, (size, size)))
        labels.append(label)
    return np.clip(np.stack(images), -0.89, 1).astype(np.float32)[:, None], np.stack(labels).astype(np.uint8)


def _settings(size: int, classes: int, *, batch_size: int, updates: int) -> MethodConfig:
    return MethodConfig(
        method="fedavg",
        classes=classes,
        size=size,
        sites=1,
        rounds=1,
        width=16,
        depth=DEPTH,
        updates=updates,
        batch_size=batch_size,
        learning_rate=RATE,
        mirror=False,
        rotation=0.0,
    )
