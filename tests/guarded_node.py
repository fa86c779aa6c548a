"""A guarded Fed-BioMed node without a network: its own files and the framework's own round, in this process."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.generative.config import FactoryConfig
from fedfactory.node.ledger.ledger import Ledger
from fedfactory.node.policy.policy import Policy
from fedfactory.node.site_choices import SiteChoices
from fedfactory.node.site_facts import description_of, store_facts
from fedfactory.node.store.slice_store import SliceStore

RESEARCHER = "RESEARCHER_3f1c"


def experiment_id() -> str:
    return f"exp_{uuid.uuid4()}"


@dataclass
class Request:
    """What a researcher sends for a round; the defaults are those of an honest one."""

    plan_class: type
    model_args: dict[str, Any]
    training_args: dict[str, Any]
    params: dict[str, torch.Tensor]
    source: str
    aggregator_args: dict[str, Any] = field(default_factory=dict)
    training: bool = True
    experiment: str = field(default_factory=experiment_id)
    state: str | None = None
    number: int = 0


class GuardedNode:
    """A node component at `root` that offers the slice store at `store`."""

    def __init__(self, root: Path, store: Path, policy: Policy | None = None) -> None:
        from fedbiomed.node.config import node_component
        from fedbiomed.node.training_plan_security_manager import TrainingPlanSecurityManager
        from fedfactory.node.protection.guard import install

        install()
        self.root, self.store = root, SliceStore(store)
        self.config = node_component.initiate(root=str(root), alias="hospital")
        self.config.set("security", "training_plan_approval", "True")
        self.config.set("security", "allow_default_training_plans", "False")
        self.config.write()
        (policy or Policy()).save(root)
        self.id = self.config.get("default", "id")
        self.database = str(root / "etc" / self.config.get("default", "db"))
        self.manager = TrainingPlanSecurityManager(
            db=self.database, node_id=self.id, node_name="hospital", hashing="SHA256", tp_approval=True
        )
        self.scalars: list[Any] = []

    @property
    def ledger(self) -> list[SimpleNamespace]:
        """Event and facts of each entry."""
        return [SimpleNamespace(event=entry.event, **entry.facts) for entry in Ledger(self.root).entries()]

    def approve(self, source: str) -> bool:
        """Ask for approval as a researcher does, and approve as an administrator does; False if it is not taken in."""
        from fedbiomed.common.message import ApprovalRequest

        asked = ApprovalRequest(
            researcher_id=RESEARCHER, request_id="r1", description="a plan for tests", training_plan=source
        )
        answer = self.manager.reply_training_plan_approval_request(asked)
        if not answer.success:
            return False
        self.manager.approve_training_plan(answer.training_plan_id)
        return True

    def run(self, request: Request, **secagg: Any) -> Any:
        """The framework's reply to a request."""
        from fedbiomed.node.history_monitor import HistoryMonitor
        from fedbiomed.node.round import Round

        round_ = Round(
            root_dir=str(self.root),
            db=self.database,
            node_id=self.id,
            node_name="hospital",
            training_plan=request.source,
            training_plan_class=request.plan_class.__name__,
            model_kwargs=request.model_args,
            training_kwargs=request.training_args,
            training=request.training,
            dataset_entry={
                "dataset_id": "dataset_1",
                "data_type": "custom",
                "path": str(self.store.path),
                "description": description_of(store_facts(self.store, SiteChoices())),
            },
            params=request.params,
            experiment_id=request.experiment,
            researcher_id=RESEARCHER,
            history_monitor=HistoryMonitor(self.id, "hospital", request.experiment, RESEARCHER, self.scalars.append),
            aggregator_args=request.aggregator_args,
            node_args={},
            tp_security_manager=self.manager,
            round_number=request.number,
        )
        refused = round_.initialize_arguments(request.state)
        if refused is not None:
            return refused
        return round_.run_model_training(
            tp_approval=True, secagg_insecure_validation=False, secagg_active=True, force_secagg=False, **secagg
        )


def _source_and_weights(plan_class: type, model_args: dict, training_args: dict) -> tuple[str, dict]:
    """Source of a plan, and the weights that a researcher sends in the first round."""
    from fedbiomed.common.training_args import TrainingArgs

    plan = plan_class()
    plan.post_init(model_args, TrainingArgs(training_args, only_required=False), {})
    return plan.source(), plan.after_training_params()


def factory_request(config: FactoryConfig) -> Request:
    """A request for phase one."""
    from fedfactory.researcher.plans.factory_plans import FactoryPlan

    model_args = {"factory": config.to_dict(), "seed": 0, "transport": "float32"}
    training_args = {"loader_args": {"batch_size": 4}, "num_updates": 3, "random_seed": 0}
    source, weights = _source_and_weights(FactoryPlan, model_args, training_args)
    return Request(FactoryPlan, model_args, training_args, weights, source)


def method_request(method: str = "fedavg", *, store: SliceStore, **settings: Any) -> Request:
    """A request for a round of federated segmentation."""
    from fedfactory.researcher.plans.segmentation_plans import PLANS

    settings = {"classes": max(2, store.classes), "size": store.format.size, "updates": 5, "batch_size": 4, **settings}
    config = MethodConfig(method=method, sites=2, rounds=1, **settings)
    model_args = {"config": config.to_dict(), "train": True}
    training_args = {
        "loader_args": {"batch_size": config.batch_size},
        "num_updates": config.updates,
        "random_seed": 0,
        "share_persistent_buffers": True,
    }
    source, weights = _source_and_weights(PLANS[method], model_args, training_args)
    return Request(PLANS[method], model_args, training_args, weights, source)
