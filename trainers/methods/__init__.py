"""Methods that make a network sparse while it trains: one file each, listed once, here.

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
METHODS.register("network-slimming")("network_slimming:NetworkSlimming")
METHODS.register("proximal-ns")("proximal_ns:ProximalNS")


def method_class(name: str) -> type[Method]:
    """Import and return the method called ``name``.

    Raises:
        ConfigError: no such method; the message gives close matches and the full list.
    """
    module, _, attribute = METHODS.get(name).partition(":")
    return getattr(import_module(f".{module}", __package__), attribute)
