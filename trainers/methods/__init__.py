"""Methods that make a network sparse while it trains: one file a family, listed once, here.

:data:`METHODS` names where each class lives, so that listing the names does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from prune_onnx.graph_ops.registry import Registry

if TYPE_CHECKING:
    from .base import Method

METHODS: Registry[str] = Registry("method")
METHODS.register("plain")("plain:Plain")
METHODS.register("fine-tune")("fine_tune:FineTune")
METHODS.register("network-slimming")("network_slimming:NetworkSlimming")
METHODS.register("proximal-ns")("proximal_ns:ProximalNS")
METHODS.register("group-lasso")("groups:GroupLasso")
METHODS.register("exclusive-sparsity")("groups:ExclusiveSparsity")
METHODS.register("group-l12")("groups:GroupL12")
METHODS.register("hsq-gl")("groups:HsqGL")
METHODS.register("hsq-es")("groups:HsqES")
METHODS.register("hsq-gl12")("groups:HsqGL12")
METHODS.register("l1-filters")("filters:L1Filters")
METHODS.register("sfp")("filters:SoftFilters")
METHODS.register("fpgm")("filters:GeometricMedian")
METHODS.register("fpgm-mix")("filters:MixedMedian")
METHODS.register("taylor")("feature_maps:Taylor")
METHODS.register("hrank")("feature_maps:HRank")
METHODS.register("backward-selection")("backward_selection:BackwardSelection")
METHODS.register("nnrelief")("nnrelief:NNrelief")
METHODS.register("magnitude")("magnitude:Magnitude")
METHODS.register("frank-wolfe")("frank_wolfe:FrankWolfe")
METHODS.register("frank-wolfe-momentum")("frank_wolfe:FrankWolfeMomentum")
METHODS.register("sfw")("stochastic_frank_wolfe:StochasticFrankWolfe")


def method_class(name: str) -> type[Method]:
    """Import and return the method called ``name``.

    Raises:
        ConfigError: no such method; the message gives close matches and the full list.
    """
    module, _, attribute = METHODS.get(name).partition(":")
    return getattr(import_module(f".{module}", __package__), attribute)
