"""What training with differential privacy has cost a store, all experiments together, in a file beside it."""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ...adaptation.privacy.accounting import Mechanism, epsilon_spent
from ...common.files import open_for_writing, write_json
from ...common.json_text import read_json
from ...common.records import read_record
from ...errors import ConfigError, NodeDataError, StoreError

BUDGET_SUFFIX, LOCK_SUFFIX = ".privacy.json", ".privacy.lock"  # after the store's name
ROUNDING = 1e-6  # share by which a limit may be exceeded, since the sum over rounds is rounded


@dataclass(frozen=True, kw_only=True)
class SpentRound:
    """One round, noted before it trained. Raises: ConfigError for impossible values.

    Attributes:
        experiment: name that the site gave to the experiment.
        noise: standard deviation of the noise over the clipping norm.
        rate: probability of a patient in an update.
        updates: number of updates.
        began: UTC, as text.
    """

    experiment: str
    noise: float
    rate: float
    updates: int
    began: str = ""

    def __post_init__(self) -> None:
        if not (0 < self.noise < math.inf and 0 < self.rate <= 1 and self.updates > 0):
            raise ConfigError(f"noise is {self.noise}, rate {self.rate}, updates {self.updates}; rounds have others")

    @property
    def mechanism(self) -> Mechanism:
        """What the accountant needs."""
        return self.noise, self.rate, self.updates


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Privacy spent at a site.

    Attributes:
        epsilon: of the experiment so far.
        epsilon_store: of all experiments on the store so far.
        delta: for which both hold.
        patients: training patients for whom they hold.
    """

    epsilon: float
    epsilon_store: float
    delta: float
    patients: int


class PrivacyBudget:
    """The rounds with differential privacy that a store has seen.

    Args:
        store: folder of the store.
    """

    def __init__(self, store: str | Path) -> None:
        store = Path(store)
        self.path = store.with_name(store.name + BUDGET_SUFFIX)
        self._lock = store.with_name(store.name + LOCK_SUFFIX)

    def rounds(self) -> list[SpentRound]:
        """All rounds, the oldest first; none without a file. Raises: StoreError for a damaged file."""
        if not self.path.is_file():
            return []
        try:
            return [read_record(SpentRound, row) for row in read_json(self.path)["rounds"]]
        except (OSError, ValueError, KeyError, TypeError, ConfigError):
            raise StoreError(
                f"{self.path}: the file is damaged; restore it from a backup, since it counts the privacy spent"
            ) from None

    def spent(self, experiment: str, *, delta: float, patients: int) -> Spent:
        """What was spent so far. Raises: StoreError, see `rounds`."""
        return _spent(self.rounds(), experiment, delta=delta, patients=patients)

    def spend(
        self, experiment: str, cost: Mechanism, *, delta: float, patients: int, limit: float, most: float | None
    ) -> Spent:
        """Note a round that is about to train, and wait until that is on the disk: neither a process that dies in the
        round nor a power cut gives the budget back.

        Args:
            experiment: name that the site gave to the experiment.
            cost: of the round.
            delta: for which epsilon is computed.
            patients: number of training patients.
            limit: epsilon of the experiment.
            most: epsilon of the store, all experiments together; None for no limit.

        Returns: what is spent with this round.
        Raises: NodeDataError, with nothing noted, if the round would exceed a limit; StoreError, see `rounds`.
        """
        noise, rate, updates = cost
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self._locked():
            new = SpentRound(experiment=experiment, noise=noise, rate=rate, updates=updates, began=began)
            rounds = [*self.rounds(), new]
            spent = _spent(rounds, experiment, delta=delta, patients=patients)
            if spent.epsilon > limit * (1 + ROUNDING):
                raise NodeDataError(
                    f"dp_epsilon is {limit:g}; this round would spend {spent.epsilon:.4g} of it: "
                    "the site trains no more rounds of this experiment"
                )
            if most is not None and spent.epsilon_store > most * (1 + ROUNDING):
                raise NodeDataError("this round would exceed the privacy budget of this site's store")
            write_json(self.path, {"rounds": [asdict(row) for row in rounds]}, compact=True, durable=True)
        return spent

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time reads and writes: a store may be registered at two nodes."""
        with open_for_writing(self._lock) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _spent(rounds: list[SpentRound], experiment: str, *, delta: float, patients: int) -> Spent:
    own = [row.mechanism for row in rounds if row.experiment == experiment]
    return Spent(
        epsilon=epsilon_spent(own, delta),
        epsilon_store=epsilon_spent([row.mechanism for row in rounds], delta),
        delta=delta,
        patients=patients,
    )
