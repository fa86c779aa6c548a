"""A request for a round, and why a site's policy refuses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...adaptation.methods.round_schedule import body_updates
from ...errors import FedFactoryError
from .arguments import shown
from .policy import Policy
from .request_kind import ADAPTATION, FACTORY, SEGMENTATION, kind_of

MOST_REASONS = 20  # that are listed
SPARE_DISK = 1.0  # GiB that a round leaves free
# What the framework would do by itself: its own evaluation, its own privacy, its own rounds. Our plans replace all of
# it, so each of its arguments must be as if it were not there. No policy can allow them.
INACTIVE: dict[str, object] = {
    "optimizer_args": {},
    "epochs": None,
    "dry_run": False,
    "batch_maxnum": None,
    "test_ratio": 0.0,
    "test_batch_size": 0,
    "test_on_local_updates": False,
    "test_on_global_updates": False,
    "shuffle_testing_dataset": False,
    "test_metric": None,
    "test_metric_args": {},
    "log_interval": 10,
    "fedprox_mu": None,
    "dp_args": None,
}


@dataclass(frozen=True, kw_only=True)
class RoundRequest:
    """What a researcher asks of this node, and what the node knows about the data that it is asked for.

    Attributes:
        training: whether the framework is to train; it never is not, in requests of this package.
        model_args: as they came, of any content.
        training_args: as the framework completed them.
        aggregator_args: as they came, of any content.
        secure_aggregation: whether what leaves is encrypted.
        patients: training patients of the data set.
        slices: training slices of the data set.
        approval_on: whether the node runs approved plans only.
        default_plans_allowed: whether the framework's example plans count as approved.
    """

    training: bool
    model_args: Mapping[str, object]
    training_args: Mapping[str, object]
    aggregator_args: Mapping[str, object]
    secure_aggregation: bool
    patients: int
    slices: int
    approval_on: bool
    default_plans_allowed: bool

    @property
    def kind(self) -> str | None:
        """FACTORY, SEGMENTATION or ADAPTATION; None for anything else, which is refused."""
        return kind_of(self.model_args)

    @property
    def sends_weights(self) -> bool:
        """Whether something that was trained on this site's slices leaves as tensors."""
        return self.kind != ADAPTATION

    @property
    def scores_only(self) -> bool:
        """Whether weights are scored without training; such a request counts as a scoring, not as a round."""
        return self.kind == SEGMENTATION and self.model_args.get("train", True) is False


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What this node has done and holds, over all researchers and experiments.

    Attributes:
        rounds: trainings in the last 24 hours.
        scorings: requests in the last 24 hours that scored without training.
        states: GiB of all states that are kept between rounds.
        free_disk: GiB that are free where they are kept.
    """

    rounds: int
    scorings: int
    states: float
    free_disk: float


def check_request(policy: Policy, request: RoundRequest, usage: Usage) -> list[str]:
    """Why the site refuses a request: one sentence for each reason, none if it is allowed. They are for the site alone.

    Nothing is opened and nothing is allocated; networks are counted on PyTorch's meta device.

    Args:
        policy: of the node.
        request: what is asked for; its arguments may be anything.
        usage: of the node so far.
    """
    reasons = [
        *_of_the_node(request),
        *_of_the_store(policy, request),
        *_of_the_usage(policy, request, usage),
        *_of_the_kind(policy, request),
        *_of_the_arguments(policy, request),
    ]
    if not reasons:  # only what is within all limits is built
        reasons = [*_of_batch_and_updates(policy, request), *_of_the_size(policy, request, usage)]
    more = len(reasons) - MOST_REASONS
    return reasons if more <= 0 else [*reasons[:MOST_REASONS], f"there are {more} more reasons"]


def _of_the_node(request: RoundRequest) -> Iterator[str]:
    if not request.approval_on:
        yield "approval of training plans is off at this node; it must be on"
    if request.default_plans_allowed:
        yield "the framework's example plans count as approved at this node; they must not"


def _of_the_store(policy: Policy, request: RoundRequest) -> Iterator[str]:
    for name, count, least in (
        ("patients", request.patients, policy.least_patients),
        ("slices", request.slices, policy.least_slices),
    ):
        if count < least:
            yield f"training {name} of the store are {count}; they must be at least {least}"


def _of_the_usage(policy: Policy, request: RoundRequest, usage: Usage) -> Iterator[str]:
    if request.scores_only:
        name, used, most = "scorings", usage.scorings, policy.scorings_a_day
    else:
        name, used, most = "rounds", usage.rounds, policy.rounds_a_day
    if used >= most:
        yield f"{name} in the last 24 hours are {used}; another one must be within {most}"


def _of_the_kind(policy: Policy, request: RoundRequest) -> Iterator[str]:
    if request.kind is None:
        names = sorted(shown(name) for name in request.model_args) if isinstance(request.model_args, Mapping) else []
        yield f"model_args has {', '.join(names[:10]) or 'nothing'}; it must have what one plan of fedfactory reads"
    if request.training is not True:
        yield "training is off; it must be on: the framework's own evaluation is not allowed"
    if policy.require_secure_aggregation and request.sends_weights and not request.secure_aggregation:
        yield "secure aggregation is off; it must be on"
    if request.scores_only and not policy.scores_leave:
        yield "train is False and scores may not leave this site; it must be True"


def _of_the_arguments(policy: Policy, request: RoundRequest) -> Iterator[str]:
    table = policy.table()
    yield from table.refusals("model_args", request.model_args)
    yield from table.refusals("aggregator_args", request.aggregator_args)
    given = request.training_args
    if not isinstance(given, Mapping):
        yield f"training_args are {shown(given)}; they must be a table"
        return
    for name, inactive in INACTIVE.items():
        if name in given and not _same(given[name], inactive):
            yield f"training_args.{name} is {shown(given[name])}; it must be {inactive}, as no plan of ours uses it"
    yield from table.refusals("training_args", {name: part for name, part in given.items() if name not in INACTIVE})


def _same(value: object, wanted: object) -> bool:
    if isinstance(wanted, (int, float)) and not isinstance(wanted, bool):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == wanted
    return type(value) is type(wanted) and value == wanted


def _of_batch_and_updates(policy: Policy, request: RoundRequest) -> Iterator[str]:
    """Both must be given wherever they are read, be enough, and agree: a plan reads one place, a person another."""
    if not request.sends_weights:
        return
    training: Mapping = request.training_args
    loader, own = _table_in(training, "loader_args"), _table_in(request.model_args, _CONFIG[request.kind])
    prefix = f"model_args.{_CONFIG[request.kind]}"
    batches = {
        "training_args.loader_args.batch_size": loader.get("batch_size"),
        f"{prefix}.batch_size": own.get("batch_size"),
    }
    updates = {"training_args.num_updates": training.get("num_updates")}
    if request.kind == SEGMENTATION:
        updates[f"{prefix}.updates"] = own.get("updates")
        yield from _of_fedicra(policy, own)
    for places, least in ((batches, policy.least_batch), (updates, policy.least_updates)):
        wrong = [
            f"{name} is {shown(value)}; it must be a whole number from {least}"
            for name, value in places.items()
            if isinstance(value, bool) or not isinstance(value, int) or value < least
        ]
        yield from wrong
        if not wrong and len(set(places.values())) > 1:
            yield f"{' and '.join(places)} are {', '.join(map(str, places.values()))}; they must be equal"


def _of_fedicra(policy: Policy, config: Mapping) -> Iterator[str]:
    """In FedICRA, only the last updates of a round train everything but the output layer."""
    share, updates = _table_in(config, "options").get("body_share"), config.get("updates")
    if type(updates) is not int or type(share) not in (int, float) or not 0 <= share <= 1:
        return  # by default most updates train the body; what is no share and no number is refused elsewhere
    body = body_updates(updates, share)
    if 0 < body < policy.least_updates:
        yield (
            f"model_args.config.options.body_share is {share}, {body} of {updates} updates; they must be 0 or at least "
            f"{policy.least_updates}"
        )


def _table_in(values: Mapping, name: str) -> Mapping:
    """A table below a name; an empty one where something else is."""
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def _of_the_size(policy: Policy, request: RoundRequest, usage: Usage) -> Iterator[str]:
    from .request_size import size_of  # only now: the networks are slow to import

    try:
        size = size_of(request.kind, request.model_args, slices=request.slices)
    except FedFactoryError as error:
        yield f"model_args describe no network ({error}); they must be those of a plan of this version"
        return
    except Exception as error:  # what a researcher sent must not end a node's round without a reason
        yield f"model_args describe no network ({type(error).__name__}); they must be those of a plan of this version"
        return
    if size.parameters > policy.most_parameters:
        yield f"parameters are {size.parameters}; they must be at most {policy.most_parameters}"
    if size.memory > policy.most_memory:
        yield f"estimated memory is {size.memory:.1f} GiB; it must be at most {policy.most_memory} GiB"
    if usage.states + size.state > policy.most_disk:
        yield f"states would take {usage.states + size.state:.1f} GiB; they must take at most {policy.most_disk} GiB"
    if size.state + SPARE_DISK > usage.free_disk:
        yield f"free disk is {usage.free_disk:.1f} GiB; it must be at least {size.state + SPARE_DISK:.1f} GiB"


_CONFIG = {FACTORY: "factory", SEGMENTATION: "config"}  # where model_args have batch and updates
