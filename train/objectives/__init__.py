"""What a model is trained for. One file each; the loop knows the protocol alone."""

from __future__ import annotations

from mmdit.flow import by_name
from train.config import Config
from train.data.shards import Cache
from train.objectives.editing import EditingObjective
from train.objectives.flow import Flow
from train.objectives.preference import PreferenceObjective
from train.objectives.prior import WithPrior
from train.objectives.protocol import Batch, Metrics, Objective

__all__ = ["Batch", "EditingObjective", "Flow", "Metrics", "Objective", "PreferenceObjective", "WithPrior", "of_run"]


def of_run(config: Config, cache: Cache) -> Objective:
    """The objective of a run."""
    flow = Flow.of(config, cache, by_name(config.formulation, config.shift))
    if config.objective == "preference":
        return PreferenceObjective(flow, config.preference)
    if config.objective == "editing":
        return EditingObjective(flow, config.edit_dropout)
    if config.prior is None:
        return flow
    made = WithPrior(flow, Cache(config.prior), config.prior_weight)
    for bucket in cache.buckets("train").values():
        made.beside(bucket[0].latent)                                        # which raises before anything has begun
    return made
