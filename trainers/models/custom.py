"""A network of the user's own, named ``package.module:factory``."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from prune_onnx.graph_ops.errors import ConfigError, PruneOnnxError
from prune_onnx.graph_ops.plugins import current_folder_first, find_function, said


def build_custom(name: str, num_classes: int, in_shape: tuple[int, int, int], width: float) -> nn.Module:
    """Import the user's factory and call it as ``factory(num_classes, in_shape=in_shape)``, with ``width`` if not 1.

    The current folder is searched for the module before what is installed.

    Args:
        name: ``package.module:factory``; a subclass of ``nn.Module`` is a factory as well.
        num_classes: passed on.
        in_shape: passed on.
        width: passed on, as a keyword, when it is not 1: a factory need not know it.

    Raises:
        ConfigError: no such module or factory, or it fails, or it returns no ``nn.Module``.
    """
    with current_folder_first():
        factory = find_function(name, "model", "factory")
        keywords: dict[str, Any] = {"in_shape": in_shape} | ({"width": width} if width != 1 else {})
        try:
            inspect.signature(factory).bind(num_classes, **keywords)
        except TypeError as error:
            raise ConfigError(
                f"model {name!r} cannot be called as factory(num_classes, {', '.join(f'{k}={k}' for k in keywords)}): "
                f"{error}."
            ) from error
        except ValueError:
            pass  # built in: it has no signature to look at
        try:
            model = factory(num_classes, **keywords)
        except PruneOnnxError:
            raise
        except Exception as error:
            raise ConfigError(f"model {name!r} fails: {said(error)}.") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name!r} must return a torch.nn.Module, not {type(model).__name__}.")
    return model
