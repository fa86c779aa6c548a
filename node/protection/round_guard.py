"""A request of a researcher at a guarded node: held against the policy, run, let out by the gate, written down."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from fedbiomed.common.logger import logger

from ...common.files import sha256_of_text
from ...errors import FedFactoryError, one_line
from ..connection.component import APPROVAL, DEFAULT_PLANS, NODE, read_component
from ..ledger.ledger import Ledger
from ..policy.policy import POLICY_FILE, Policy
from ..policy.request import RoundRequest, Usage, check_request
from ..states.states import after_round, bytes_of_states, check_experiment_id, check_state_id
from ..store.slice_store import INDEX, SliceStore
from .gate import MAX_MESSAGE, GateError, Passed, check_reply, digest_of
from .guarded_round import GuardedRound, begin
from .package_digest import digest_of_all, package_fingerprint
from .site_secret import site_secret

REFUSED = "this site's policy refuses the request"  # all that a researcher learns; the ledger has the reasons
DAY = timedelta(hours=24)
GIB = 2**30
SCORES = ("dice", "hd95")  # parts of the names of scores on test cases


class RefusedError(Exception):
    """A part of the guard has refused the round and written down why."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the framework knows of a request.

    Attributes:
        researcher: id of the researcher.
        experiment: id of the experiment.
        domain: of the data set, as it was registered.
        state: id of the node's state that is to be continued; None for a beginning.
        plan_class: name of the plan's class.
        plan: source text of the plan.
        training: whether weights are to be trained.
        model_args: of the plan.
        training_args: of the plan.
        aggregator_args: of the plan.
        secure_aggregation: whether weights would leave encrypted.
        approval: whether the running node asks for approval; its file may say something else by now.
        store: folder of the registered slice store.
        node: id of the node.
        database: JSON file of the node.
    """

    researcher: str
    experiment: str
    domain: str
    state: str | None
    plan_class: str
    plan: str
    training: bool
    model_args: Mapping[str, Any]
    training_args: Mapping[str, Any]
    aggregator_args: Mapping[str, Any]
    secure_aggregation: bool
    approval: bool
    store: Path
    node: str
    database: Path


class SiteGuard:
    """The protection of one node, for all researchers and experiments together.

    Args:
        root: folder of the node, in which there is a policy.

    Attributes:
        ledger: of the node.
        package: SHA-256 of the installed package, as it was when the node began.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ledger = Ledger(root)
        self.package = digest_of_all(package_fingerprint())
        self._policy: tuple[str, Policy] | None = None
        self._stores: dict[Path, tuple[float, int, int]] = {}

    @property
    def policy(self) -> Policy:
        """The policy as it is now in its file. Raises: FedFactoryError if that cannot be used."""
        digest = hashlib.sha256((self.root / POLICY_FILE).read_bytes()).hexdigest()
        if self._policy is None or self._policy[0] != digest:
            policy = Policy.load(self.root)
            self.ledger.append("policy", policy_sha256=digest)
            self._policy = digest, policy
        return self._policy[1]

    @cached_property
    def secret(self) -> bytes:
        return site_secret(self.root)

    def run(self, asked: Asked, train: Callable[[], Any], refuse: Callable[[str], Any]) -> Any:
        """Run a round if the policy allows it, and let its reply out if it holds nothing but what was declared.

        Args:
            asked: the request.
            train: runs the round; its result is the framework's reply.
            refuse: makes a reply of a failed round with a text.

        Returns: the reply that may be sent.
        """
        started = time.monotonic()
        facts = self._facts(asked)
        try:
            policy = self.policy
            patients, slices = self._counts(asked.store)
            reasons = self._reasons(policy, asked, patients, slices)
        except (FedFactoryError, OSError) as error:
            reasons = [str(error)]
        except Exception as error:  # arguments may be of any type; what cannot be checked is not run
            reasons = [f"it cannot be checked ({type(error).__name__}: {error})"]
        if reasons:
            self._note_refusal(facts, reasons)
            return refuse(REFUSED)
        since = datetime.now(timezone.utc) - DAY
        event = "scoring" if asked.model_args.get("train", True) is False else "round"
        scored = 0 if event == "scoring" else self.ledger.count("round", since, scores=True)
        round_ = GuardedRound(
            policy=policy,
            secret=self.secret,
            scores_left=scored < policy.scores_a_day,
            qualities_left=self.ledger.count("round", since, quality=True) < policy.qualities_a_day,
        )
        passed, failed, entry = Passed(), "", dict(facts)
        try:
            with begin(round_):
                reply = train()
            if reply.success:
                passed = check_reply(reply, round_, samples=slices)
            else:
                failed = reply.msg = one_line(str(reply.msg))[:MAX_MESSAGE]
        except RefusedError:
            return refuse(REFUSED)
        except GateError as error:
            failed, reply = str(error), refuse(REFUSED)
        except Exception as error:  # the framework would send its text
            failed, reply = f"{type(error).__name__}: {error}", refuse("the round failed at this site")
        entry |= {
            "seconds": round(time.monotonic() - started, 2),
            "samples": reply.sample_size,
            "tensors": [list(tensor) for tensor in passed.tensors],
            "bytes": passed.size,
            "numbers": passed.numbers,
            "withheld": [*passed.withheld, *round_.held_back],
            "quality": any(name.startswith("quality_") for name in passed.numbers),
            "scores": any(part in name for name in passed.numbers for part in SCORES),
            **round_.private,
        }
        if failed:
            entry["failed"] = one_line(failed)[:MAX_MESSAGE]
        try:
            self.ledger.append(event, **entry)
            self._forget_states(asked, reply)
        except (FedFactoryError, OSError) as error:  # what is not written down does not leave
            logger.error(f"fedfactory: {error}")
            return refuse("the round failed at this site")
        return reply

    def _note_refusal(self, facts: dict[str, object], reasons: list[str]) -> None:
        try:
            self.ledger.append("refused", **facts, reasons=[one_line(reason)[:MAX_MESSAGE] for reason in reasons])
        except (FedFactoryError, OSError) as error:  # it is refused all the same
            logger.error(f"fedfactory: {error}")

    def _forget_states(self, asked: Asked, reply: Any) -> None:
        """Remove states for which no researcher can ask any more."""
        if reply.success:
            after_round(
                self.root, asked.node, asked.database, asked.experiment, reply.state_id, previous_state_id=asked.state
            )

    def _facts(self, asked: Asked) -> dict[str, object]:
        """What the ledger says of a request, whether it is refused or not."""
        settings = (asked.model_args, asked.training_args, asked.aggregator_args)
        return {
            "researcher": one_line(str(asked.researcher))[:MAX_MESSAGE],
            "experiment": one_line(str(asked.experiment))[:MAX_MESSAGE],
            "plan": one_line(str(asked.plan_class))[:MAX_MESSAGE],
            "domain": asked.domain,
            "plan_sha256": sha256_of_text(asked.plan),
            "package_sha256": self.package,
            "settings_sha256": digest_of(settings),
        }

    def _reasons(self, policy: Policy, asked: Asked, patients: int, slices: int) -> list[str]:
        check_experiment_id(asked.experiment)
        if asked.state is not None:
            check_state_id(asked.state)
        node = read_component(self.root, NODE)
        since = datetime.now(timezone.utc) - DAY
        request = RoundRequest(
            training=asked.training,
            model_args=asked.model_args,
            training_args=asked.training_args,
            aggregator_args=asked.aggregator_args,
            secure_aggregation=asked.secure_aggregation,
            patients=patients,
            slices=slices,
            approval_on=asked.approval and node.is_on(APPROVAL),
            default_plans_allowed=node.is_on(DEFAULT_PLANS),
        )
        usage = Usage(
            rounds=self.ledger.count("round", since),
            scorings=self.ledger.count("scoring", since),
            states=bytes_of_states(self.root) / GIB,
            free_disk=shutil.disk_usage(self.root).free / GIB,
        )
        return check_request(policy, request, usage)

    def _counts(self, folder: Path) -> tuple[int, int]:
        """Training patients and training slices of a store, from its index; no image is opened."""
        changed = (folder / INDEX).stat().st_mtime
        known = self._stores.get(folder)
        if known is None or known[0] != changed:
            cases = [case for case in SliceStore(folder).cases if case.split == "train"]
            known = changed, len({case.patient for case in cases}), sum(case.count for case in cases)
            self._stores[folder] = known
        return known[1:]
