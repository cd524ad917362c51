"""How a change of a few channels of a map passes through a network: only these channels are computed.

Activations, pooling, BatchNorm by its statistics, depthwise convolutions, sums and products with values that stay as
they are, concatenation and Flatten work channel by channel: what was a :class:`Change` before is one behind them. A
layer that mixes channels adds what its weights make of the difference to what it gave without the change. Where
:func:`passed` does not know that a node is of one of these kinds it says so, and the whole map has to be computed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from .from_onnx import layers as onnx_layers
from .from_onnx.base import Operation, ints
from .from_onnx.elementwise import UNARY

ACTIVATIONS = {
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, nn.Threshold, nn.AlphaDropout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
}  # fmt: skip
"""Modules that treat every number by itself; classes derived from them may do anything."""

POINTWISE = {
    "abs", "alpha_dropout", "celu", "clamp", "clone", "contiguous", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "elu", "exp", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "neg", "relu",
    "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "square", "sqrt", "tanh", "threshold",
    "add", "div", "maximum", "minimum", "mul", "sub", "truediv",
}  # fmt: skip
"""Functions and methods that do so, or take numbers at the same place together."""

ONNX_POINTWISE = {
    *UNARY, "Add", "Celu", "Clip", "Div", "Dropout", "Elu", "Gelu", "HardSigmoid", "Identity", "LeakyRelu", "Max",
    "Min", "Mul", "PRelu", "Selu", "Sub", "Sum", "Swish", "ThresholdedRelu",
}  # fmt: skip

ONNX_POOLS = {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"}

KINDS, RANKS = {"AvgPool": "avg_pool", "MaxPool": "max_pool", "AdaptiveAvgPool": "adaptive_avg_pool",
                "AdaptiveMaxPool": "adaptive_max_pool"}, (1, 2, 3)  # fmt: skip

CONVOLUTIONS: dict[type[nn.Module], Callable[..., torch.Tensor]] = {
    nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d,
    onnx_layers.Conv1d: F.conv1d, onnx_layers.Conv2d: F.conv2d, onnx_layers.Conv3d: F.conv3d,
}  # fmt: skip


def _functions(*names: str) -> set[object]:
    """Return the functions of these names, those in place too, and the names, which methods go by."""
    every = [form for name in names for form in (name, name + "_", "i" + name)]
    return {*every, *(getattr(space, name) for space in (torch, F, operator) for name in every if hasattr(space, name))}


POINTWISE_CALLS = _functions(*POINTWISE)
POOLS: dict[object, int] = {getattr(nn, f"{kind}{rank}d"): rank + 2 for kind in KINDS for rank in RANKS}
POOLS |= {call: rank + 2 for name in KINDS.values() for rank in RANKS for call in _functions(f"{name}{rank}d")}
MEANS, CONCATENATIONS = _functions("mean"), _functions("cat", "concat")
RESHAPES = {*_functions("flatten", "reshape", "squeeze"), "view", nn.Flatten}
ONNX_RESHAPES = {"Flatten", "Reshape", "Squeeze"}


@dataclass
class Change:
    """A map that some copies have with a few channels of their own, all others as they were.

    Attributes:
        before: what it was, (S, C, ...).
        channels: the changed ones of each copy, (copies, k).
        values: of these, (copies * S, k, ...).
    """

    before: torch.Tensor
    channels: torch.Tensor
    values: torch.Tensor

    @classmethod
    def zeros(cls, before: torch.Tensor, channels: torch.Tensor) -> Change:
        """Return the change of channels to zero."""
        size = (channels.shape[0] * len(before), channels.shape[1], *before.shape[2:])
        return cls(before, channels, before.new_zeros(size))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Copies, images, channels of the map, changed channels."""
        return len(self.channels), len(self.before), self.before.shape[1], self.channels.shape[1]

    def at(self, values: torch.Tensor) -> torch.Tensor:
        """Return the changed channels of another map, (S, C, ...), as (copies * S, k, ...)."""
        copies, _, _, count = self.sizes
        taken = values.index_select(1, self.channels.flatten()).unflatten(1, (copies, count))
        return taken.transpose(0, 1).flatten(0, 1)

    def whole(self) -> torch.Tensor:
        """Return the maps of all copies with all channels, (copies * S, C, ...)."""
        copies, images, *_ = self.sizes
        maps = self.before.expand(copies, *self.before.shape).clone()
        index = torch.arange(copies, device=maps.device)[:, None]
        maps[index, :, self.channels] = self.values.unflatten(0, (copies, images)).transpose(1, 2)
        return maps.flatten(0, 1)


def passed(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], after: object
) -> Change | torch.Tensor | None:
    """Return what a node makes of a change, or ``None`` where only the whole map tells.

    Args:
        target: the module, function or name of the method.
        args: what it is given: changes; what no change reaches, as it is.
        kwargs: the same.
        after: what the node gives without the change.

    Returns:
        A change; a layer that mixes channels gives the maps of all copies, (copies * S, ...).
    """
    changes = [value for value in _flat((args, kwargs)) if isinstance(value, Change)]
    first, operation = changes[0], target.op_type if isinstance(target, Operation) else None
    kind = type(target) if isinstance(target, nn.Module) else target
    if not isinstance(after, torch.Tensor) or _hooked(target):
        return None
    if kind in CONCATENATIONS or operation == "Concat":
        return _concatenated(target, operation, args, kwargs, after)
    if kind in POINTWISE_CALLS or operation in ONNX_POINTWISE:
        return _by_number(target, changes, args, kwargs, after)
    if args[0] is not first:
        return None
    if kind in RESHAPES or operation in ONNX_RESHAPES:
        return _flattened(first, after)
    if len(changes) > 1:
        return None
    if kind in CONVOLUTIONS or kind is nn.Linear:
        return _mixed(target, first, after)
    if isinstance(target, nn.modules.batchnorm._BatchNorm):
        return _normalised(target, first, after)
    apart = POOLS.get(kind) == first.before.dim() or kind in ACTIVATIONS or operation in ONNX_POOLS
    if not apart and (kind in MEANS or operation == "ReduceMean"):
        apart = _over_space(target, operation, first, args, kwargs)
    if apart:
        return _called(target, first, (first.values, *args[1:]), kwargs, after)
    return None


def wants_shape(node: fx.Node, target: Any) -> bool:
    """Return whether a node asks for nothing but the shape of what it is given."""
    if isinstance(target, Operation):
        return target.op_type in ("Shape", "Size")
    return target in ("size", "dim", "numel") or (target is getattr and node.args[1] in ("shape", "ndim"))


def shape_of(change: Change) -> torch.Tensor:
    """Return a stand-in of the shape that all copies have together, without numbers of its own."""
    copies, images, *_ = change.sizes
    return change.before.new_empty(()).expand(copies * images, *change.before.shape[1:])


def is_product(module: nn.Module, *inputs: object) -> bool:
    """Return whether a module is a convolution whose window takes the whole map: its output has one place."""
    if type(module) not in CONVOLUTIONS or _hooked(module) or not _pads_alike(module):
        return False
    plain = module.groups == 1 and not any(module.padding) and set(module.dilation) == {1}
    return plain and isinstance(inputs[0], torch.Tensor) and inputs[0].shape[2:] == module.kernel_size


def as_product(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what such a convolution gives, (N, O, 1, ...): as a product of matrices it takes half the time."""
    return F.linear(x.flatten(1), module.weight.flatten(1), module.bias)[(..., *[None] * (x.dim() - 2))]


def _hooked(module: object) -> bool:
    return bool(getattr(module, "_forward_hooks", ()) or getattr(module, "_forward_pre_hooks", ()))


def _pads_alike(layer: Any) -> bool:
    """Return whether a convolution has zeros around its map, as many on both sides."""
    window = getattr(layer, "window", None)
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and (not window or window.symmetric)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [one for part in value for one in _flat(part)]
    return _flat(tuple(value.values())) if isinstance(value, dict) else [value]


def _called(
    target: Any, change: Change, args: tuple[Any, ...], kwargs: dict[str, Any], after: torch.Tensor
) -> Change | None:
    """Call what works channel by channel; what it gives is checked for its number of channels."""
    call = getattr(torch.Tensor, target) if isinstance(target, str) else target
    values = call(*args, **kwargs)
    copies, images, channels, count = change.sizes
    if not isinstance(values, torch.Tensor) or values.shape[:2] != (copies * images, count):
        return None
    return Change(after, change.channels, values) if after.shape[:2] == (images, channels) else None


def _by_number(
    target: Any, changes: list[Change], args: tuple[Any, ...], kwargs: dict[str, Any], after: torch.Tensor
) -> Change | None:
    """Call what takes numbers at the same place together: of values that stay as they are, at the same channels."""
    first, rank = changes[0], changes[0].before.dim()
    if after.dim() != rank or not all(
        change.before.shape[1] == first.before.shape[1]
        and change.before.dim() == rank
        and torch.equal(change.channels, first.channels)
        for change in changes
    ):
        return None
    copies, images, channels, _ = first.sizes

    def fitting(value: Any) -> Any:
        if isinstance(value, Change):
            return value.values
        if not isinstance(value, torch.Tensor) or (value.numel() == 1 and value.dim() < rank):
            return value
        value = value.reshape((1,) * (rank - value.dim()) + value.shape).expand(images, *[-1] * (rank - 1))
        return first.at(value) if value.shape[1] == channels else value.repeat(copies, *[1] * (rank - 1))

    if any(isinstance(value, torch.Tensor) and value.dim() > rank for value in _flat((args, kwargs))):
        return None
    given = fx.node.map_aggregate((args, kwargs), fitting)
    return _called(target, first, *given, after)


def _concatenated(
    target: Any, operation: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], after: torch.Tensor
) -> Change | None:
    """Pass on the changes of all parts of a concatenation of channels."""
    parts = args if operation else args[0] if args else ()
    axis = target.attribute("axis") if operation else kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if axis not in (1, 1 - after.dim()) or not parts:
        return None
    channels, values, start = [], [], 0
    for part in parts:
        if isinstance(part, Change):
            channels.append(part.channels + start)
            values.append(part.values)
        start += (part.before if isinstance(part, Change) else part).shape[1]
    return Change(after, torch.cat(channels, 1), torch.cat(values, 1))


def _flattened(change: Change, after: torch.Tensor) -> Change | None:
    """Return (copies * S, k * places): a channel's places are neighbours."""
    before = change.before
    if after.shape != (len(before), math.prod(before.shape[1:])):
        return None
    places = math.prod(before.shape[2:])
    channels = change.channels[..., None] * places + torch.arange(places, device=before.device)
    return Change(after, channels.flatten(1), change.values.flatten(1))


def _over_space(
    target: Any, operation: str | None, change: Change, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Return whether a mean is over axes behind that of the channels."""
    axes = args[1] if len(args) > 1 else kwargs.get("dim", target.attribute("axes") if operation else None)
    axes = ints(axes) if isinstance(axes, torch.Tensor) else axes
    axes = [axes] if isinstance(axes, int) else list(axes or ())
    return bool(axes) and all(axis % change.before.dim() > 1 for axis in axes)


def _normalised(norm: nn.modules.batchnorm._BatchNorm, change: Change, after: torch.Tensor) -> Change | None:
    """Scale and shift the changed channels."""
    if norm.running_mean is None or norm.running_var is None:
        return None
    copies, images, _, count = change.sizes
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale if norm.bias is None else norm.bias - norm.running_mean * scale
    shape = (copies, 1, count, *[1] * (after.dim() - 2))
    values = change.values.unflatten(0, (copies, images))
    values = torch.addcmul(shift[change.channels].view(shape), values, scale[change.channels].view(shape))
    return Change(after, change.channels, values.flatten(0, 1))


def _mixed(layer: Any, change: Change, after: torch.Tensor) -> Change | torch.Tensor | None:
    """Add what a layer's weights make of the difference to what it gave; a depthwise one gives changed channels."""
    copies, images, channels, _ = change.sizes
    linear, rank = isinstance(layer, nn.Linear), change.before.dim() - 2
    if (linear and rank) or not (linear or _pads_alike(layer)):
        return None
    if not linear and layer.groups == channels == layer.out_channels:
        return _depthwise(layer, change, after)
    if not linear and (layer.groups > 1 or rank > 2):
        return None
    difference = change.values - change.at(change.before)
    if linear or (set(layer.kernel_size + layer.stride) == {1} and not any(layer.padding)):
        columns = difference.flatten(2) if rank else difference[..., None]
    else:
        one = rank == 1
        settings = [
            ((least,) * one) + value
            for value, least in ((layer.kernel_size, 1), (layer.dilation, 1), (layer.padding, 0), (layer.stride, 1))
        ]
        columns = F.unfold(difference[:, :, None] if one else difference, *settings)
    weight = layer.weight[:, change.channels].flatten(3) if not linear else layer.weight[:, change.channels][..., None]
    weight = weight.permute(1, 2, 3, 0).flatten(1, 2)  # (copies, k * places, O)
    rows = columns.unflatten(0, (copies, images)).transpose(2, 3).flatten(1, 2)  # (copies, S * L, k * places)
    usual = after.flatten(2).transpose(1, 2).flatten(0, 1) if rank else after
    maps = torch.baddbmm(usual.expand(copies, *usual.shape), rows, weight)
    return maps.view(copies * images, *after.shape[2:], -1).movedim(-1, 1).contiguous()  # the network may call view


def _depthwise(layer: Any, change: Change, after: torch.Tensor) -> Change:
    """Return each changed channel's convolution."""
    copies, images, _, count = change.sizes
    maps = change.values.unflatten(0, (copies, images)).transpose(0, 1).flatten(1, 2)  # (S, copies * k, ...)
    chosen = change.channels.flatten()
    bias = None if layer.bias is None else layer.bias[chosen]
    maps = CONVOLUTIONS[type(layer)](
        maps, layer.weight[chosen], bias, layer.stride, layer.padding, layer.dilation, len(chosen)
    )
    values = maps.unflatten(1, (copies, count)).transpose(0, 1).flatten(0, 1)
    return Change(after, change.channels, values)
