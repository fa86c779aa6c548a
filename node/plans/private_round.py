"""A round with differential privacy at a site: how much noise, whether the budget has room, which random numbers."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import MutableMapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from fedbiomed.common.logger import logger

from ...adaptation.labels.candidate_labels import SiteSlices
from ...adaptation.methods.interface.method_config import MethodConfig
from ...adaptation.privacy.accounting import largest_delta, noise_multiplier
from ...adaptation.privacy.private_updates import PatientSampling, PrivateUpdates, patients_of
from ...errors import NodeDataError, StoreError
from ..protection import guarded_round
from ..protection.privacy_budget import PrivacyBudget, Spent

PRIVATE_EXPERIMENT = "private_experiment"  # in what the site keeps between rounds
FEW_PATIENTS = 10
KEY_LENGTH = 16  # bytes of the key of the generator


class PrivateRound:
    """Privacy of one round at a site. Its spending is noted by `begin`, before anything is trained.

    Args:
        config: of the method, with `dp_epsilon`.
        store: folder of the site's store.
        data: the site's training slices.
        kept: what the site keeps of this experiment between rounds; changed in place.

    Raises: NodeDataError for labels other than dense ones, and for a delta above what the site accepts.
    """

    def __init__(self, config: MethodConfig, store: Path, data: SiteSlices, kept: MutableMapping[str, object]) -> None:
        self.config, self.budget = config, PrivacyBudget(store)
        self.patients = len(patients_of(data))
        if not self.patients:
            raise NodeDataError("this site has no patient with dense labels; differential privacy needs some")
        self.delta = config.dp_delta or largest_delta(self.patients)
        if self.delta > largest_delta(self.patients):
            raise NodeDataError(
                f"dp_delta is {self.delta:g}; it must be at most {largest_delta(self.patients):g}, "
                "a tenth of 1 / training patients of this site"
            )
        # A name of the site's own: the researcher could give two experiments one name, or one experiment two.
        self.experiment = str(kept.setdefault(PRIVATE_EXPERIMENT, secrets.token_hex(8)))

    def begin(self) -> PrivateUpdates:
        """Note the round's spending, and return its noise and random numbers.

        Raises: NodeDataError if a limit would be exceeded, or if no noise is large enough; StoreError's text stays.
        """
        config, guard = self.config, guarded_round.current()
        sampling = PatientSampling.of(self.patients, config.batch_size)
        updates = config.rounds * config.updates
        noise = noise_multiplier(float(config.dp_epsilon), self.delta, rate=sampling.rate, updates=updates)
        try:
            spent = self.budget.spend(
                self.experiment, (noise, sampling.rate, config.updates), delta=self.delta, patients=self.patients,
                limit=config.dp_epsilon, most=guard.policy.most_epsilon,
            )  # fmt: skip
        except StoreError as error:
            raise _unreadable(error) from None
        if self.patients < FEW_PATIENTS:
            logger.warning(
                f"fedfactory: epsilon {config.dp_epsilon:g} with {self.patients} training patients: noise that covers "
                "one of so few covers nearly all that they have in common; expect a poor segmenter"
            )
        guard.private |= asdict(spent)
        return PrivateUpdates(noise=noise, rng=secret_generator(guard.secret))

    def spent(self) -> Spent:
        """What is spent so far. Raises: NodeDataError if the site's file is damaged."""
        try:
            return self.budget.spent(self.experiment, delta=self.delta, patients=self.patients)
        except StoreError as error:
            raise _unreadable(error) from None


def secret_generator(secret: bytes) -> np.random.Generator:
    """New random numbers with every call, one of 2^128 sequences, from the machine's entropy and the site's secret."""
    key = hmac.new(secret, secrets.token_bytes(32), hashlib.sha256).digest()[:KEY_LENGTH]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))


def _unreadable(error: StoreError) -> NodeDataError:
    logger.error(f"fedfactory: {error}")
    return NodeDataError("this site's record of privacy spent cannot be read; see the node's log")
