"""Which filters can only be removed together, seen from one forward pass of any network.

Every channel carries a label on its way through the network. A layer's units begin labels; sums and products join the
labels that meet in them; concatenation, zero padding of channels, pooling and activations pass them on. All units with
one label in the end are one group: a residual stream's channel, with every layer that writes it. What the pass does not
understand pins the labels that reach it, as does the network's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from .masks import is_layer
from .trace import Layer, evaluating

CONTRACTIONS = {"conv1d", "conv2d", "conv3d", "linear"}
"""Functions whose outputs begin labels, where a layer's module says so."""

JOINING = {"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__", "mul", "mul_",
           "__mul__", "__rmul__", "__imul__", "div", "__truediv__", "maximum", "minimum"}  # fmt: skip

FLATTENING = {"flatten", "view", "reshape"}

MOVING = {"permute", "transpose", "movedim", "swapaxes", "roll", "flip", "chunk", "split", "unbind", "index_select",
          "gather", "squeeze", "unsqueeze", "softmax", "cumsum", "matmul", "bmm", "einsum", "repeat",
          "expand"}  # fmt: skip
"""Functions that may leave the number of channels as it is and yet do something else to the axis."""


@dataclass
class Coupling:
    """The groups of a network's units.

    Attributes:
        units: group of each unit of a layer, (units,).
        norms: group of each channel of a BatchNorm, (channels,).
        components: the groups that belong to the same layers, where they may go; each with a convolution in it.
    """

    units: dict[nn.Module, torch.Tensor]
    norms: dict[nn.Module, torch.Tensor]
    components: list[torch.Tensor]

    @classmethod
    def separate(cls, layers: list[Layer]) -> Coupling:
        """Return groups of one unit each, for layers whose channels meet no other's."""
        ends = list(accumulate((len(layer.module.weight) for layer in layers), initial=0))
        parts = [torch.arange(start, end) for start, end in pairwise(ends)]
        return cls({layer.module: part for layer, part in zip(layers, parts, strict=True)}, {}, parts)

    @property
    def free(self) -> torch.Tensor:
        """The groups that may go."""
        return torch.cat([torch.tensor([], dtype=torch.long), *self.components])

    def writers(self, layers: list[Layer]) -> list[Layer]:
        """Return those of the layers that have units which may go."""
        return [layer for layer in layers if torch.isin(self.units[layer.module], self.free).any()]

    def mean(self, scores: dict[nn.Module, torch.Tensor]) -> torch.Tensor:
        """Return each group's mean over its units' scores; groups that have none get 0.

        Args:
            scores: of the units of some layers.
        """
        size = 1 + max(int(groups.max()) for groups in self.units.values())
        first = next(iter(scores.values()))
        total, count = first.new_zeros(size), first.new_zeros(size)
        for module, values in scores.items():
            groups = self.units[module].to(values.device)
            total.index_add_(0, groups, values)
            count.index_add_(0, groups, torch.ones_like(values))
        return total / count.clamp_min(1)


class _Labels(TorchFunctionMode):
    """Labels of the tensors of a pass, and which of them are one."""

    def __init__(self) -> None:
        super().__init__()
        self.parent: list[int] = []
        self.pinned: set[int] = set()
        self.of: dict[int, tuple[torch.Tensor, list[int]]] = {}  # the tensor is kept, so that its id stays its own

    def fresh(self, count: int) -> list[int]:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return self.parent[first:]

    def root(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = label = self.parent[self.parent[label]]
        return label

    def join(self, a: list[int], b: list[int]) -> None:
        for one, other in zip(a, b, strict=True):
            self.parent[self.root(one)] = self.root(other)

    def labels(self, tensor: Any) -> list[int] | None:
        return self.of.get(id(tensor), (None, None))[1]

    def mark(self, tensor: torch.Tensor, labels: list[int]) -> None:
        self.of[id(tensor)] = (tensor, labels)

    def pin(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            self.pinned.update(self.labels(tensor) or ())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        several = args[0] if args and isinstance(args[0], tuple | list) else args
        known = [(t, self.labels(t)) for t in several if isinstance(t, torch.Tensor) and self.labels(t) is not None]
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not known or name in CONTRACTIONS or not isinstance(result, torch.Tensor | tuple | list):
            return result
        labels = self._passed(name, args, kwargs, known, result) if isinstance(result, torch.Tensor) else None
        if labels is not None:
            self.mark(result, labels)
        else:
            self.pin(*(tensor for tensor, _ in known))
        return result

    def _passed(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        known: list[tuple[torch.Tensor, list[int]]],
        result: torch.Tensor,
    ) -> list[int] | None:
        """Return the labels of a result's channels; ``None`` where it is not clear what they are."""
        tensor, labels = known[0]
        channels = result.shape[1] if result.dim() > 1 else 0
        if name in ("cat", "concat", "concatenate"):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % tensor.dim()
            if dim == 1:
                return [label for t in args[0] for label in self.labels(t) or self._outside(t.shape[1])]
            return None
        if name == "pad":
            pads = args[1] if len(args) > 1 else kwargs["pad"]
            at = 2 * (tensor.dim() - 2)  # amounts come by axis, the last axis first
            before, after = pads[at : at + 2] if len(pads) > at else (0, 0)
            padded = [*self.fresh(before), *labels, *self.fresh(after)]
            return padded if channels == len(padded) else None
        if name in FLATTENING and result.dim() == 2 < tensor.dim() and channels == tensor[0].numel():
            return [label for label in labels for _ in range(channels // len(labels))]
        if name in MOVING or (name in FLATTENING and result.shape != tensor.shape) or channels != len(labels):
            return None
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            whole = all(isinstance(part, slice) for part in index) and index[1:2] in ((), (slice(None),))
            return labels if whole else None
        if name in JOINING:
            if any(len(other) != channels for _, other in known):
                return None
            for _, other in known[1:]:
                self.join(labels, other)
            if len(known) == 1 and any(t.dim() > 1 and t.shape[1] == channels > 1 for t in self._others(args, tensor)):
                return None  # something of unknown origin has a value for each channel
        return labels

    def _others(self, args: tuple[Any, ...], tensor: torch.Tensor) -> list[torch.Tensor]:
        return [t for t in args if isinstance(t, torch.Tensor) and t is not tensor]

    def _outside(self, count: int) -> list[int]:
        """Return labels of channels that no layer made: they stay."""
        labels = self.fresh(count)
        self.pinned.update(labels)
        return labels


@torch.no_grad()
def couple(model: nn.Module, layers: list[Layer], inputs: torch.Tensor) -> Coupling:
    """Return which units go together.

    Args:
        model: run once, in evaluation mode; left as it is.
        layers: of :func:`~.trace.trace`.
        inputs: a small batch.
    """
    labels = _Labels()
    units = {layer.module: labels.fresh(len(layer.module.weight)) for layer in layers}
    norms: dict[nn.Module, list[int]] = {}

    def ran(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if isinstance(module, _BatchNorm):
            norms[module] = labels.labels(args[0]) or labels.fresh(module.num_features)
            return
        own, groups = units[module], getattr(module, "groups", 1)
        if groups > 1:
            given = labels.labels(args[0])
            if given is not None and groups == len(given) == len(own):  # depthwise
                labels.join(own, given)
            else:
                labels.pin(args[0])
                labels.pinned.update(own)
        if not isinstance(module, nn.Linear) or output.dim() == 2:
            labels.mark(output, own)
        else:
            labels.pinned.update(own)

    hooks = [m.register_forward_hook(ran) for m in model.modules() if is_layer(m) or isinstance(m, _BatchNorm)]
    try:
        with evaluating(model), labels:
            labels.pin(model(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    pinned = {labels.root(label) for label in labels.pinned}

    def groups(names: list[int]) -> torch.Tensor:
        return torch.tensor([labels.root(name) for name in names])

    found = {module: groups(names) for module, names in units.items()}
    return Coupling(found, {norm: groups(names) for norm, names in norms.items()}, _components(found, pinned))


def _components(units: dict[nn.Module, torch.Tensor], pinned: set[int]) -> list[torch.Tensor]:
    """Return the groups that may go, those of layers that share some together."""
    sets: list[tuple[set[int], bool]] = []
    for module, groups in units.items():
        own, convolution = set(groups.tolist()), not isinstance(module, nn.Linear)
        for other in [pair for pair in sets if pair[0] & own]:
            sets.remove(other)
            own, convolution = own | other[0], convolution or other[1]
        sets.append((own, convolution))
    return [torch.tensor(sorted(own - pinned)) for own, convolution in sets if convolution and own - pinned]
