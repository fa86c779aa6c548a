"""What the administrator of a node allows a researcher to ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POLICY_FILE = Path("etc") / "policy.json"  # below the node's folder


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Limits of a node for all researchers and experiments together.

    Attributes:
        least_patients: training patients that a store must have to take part in a round.
        least_slices: training slices that a store must have to take part in a round.
        least_batch: smallest number of slices in an update.
        least_updates: smallest number of updates in a round.
        least_patients_scored: test patients below whose number no score leaves.
        scores_leave: whether scores on test cases may leave.
        quality_leaves: whether numbers that compare synthetic with real slices may leave.
        rounds_a_day: trainings in 24 hours.
        scorings_a_day: requests in 24 hours that score weights without training.
        qualities_a_day: rounds in 24 hours of which numbers about synthetic slices leave.
        most_parameters: of the networks of a round.
        most_memory: estimated memory of a round, GiB.
        most_disk: of all states that the node keeps between rounds, GiB.
        require_secure_aggregation: whether weights leave encrypted only.
        allow_federated_analytics: whether the framework's statistics of data sets may be asked for.
        allow_preprocessing: whether the framework's preprocessing of data sets may be asked for.
        most_epsilon: privacy budget of a store, all experiments together; None for no limit.
    """

    least_patients: int = 2
    least_slices: int = 8
    least_batch: int = 2
    least_updates: int = 2
    least_patients_scored: int = 2
    scores_leave: bool = True
    quality_leaves: bool = True
    rounds_a_day: int = 2000
    scorings_a_day: int = 50
    qualities_a_day: int = 30
    most_parameters: int = 200_000_000
    most_memory: float = 64.0
    most_disk: float = 50.0
    require_secure_aggregation: bool = False
    allow_federated_analytics: bool = False
    allow_preprocessing: bool = False
    most_epsilon: float | None = None
