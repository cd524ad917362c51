"""Networks with dead channels, and what must be true of their exact removal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.constants import Constants
from prune_onnx.graph_ops.cut import cut
from prune_onnx.graph_ops.exact import Edits, carry, removable

from .builder import Net, analysed, check_valid, distance, outputs_of, run_ort, run_reference

PAD = {"pads": [1, 1, 1, 1]}
TYPES = [np.float32, np.float64]


TYPES = [np.float32, np.float64]


@dataclass
class Exact:
    """Result of an exact removal: group name to (channels, kept channels), and what became of the constants."""

    analysis: Analysis
    counts: dict[str, tuple[int, int]]
    edits: Edits
    model: onnx.ModelProto
    naive: float
    """How far the output moves when the same channels go and their constants are forgotten."""

    def kept(self, name: str) -> int:
        return self.counts[name][1]


def check_exact(model: onnx.ModelProto, *, select: bool = False) -> Exact:
    """Remove what can go exactly; the output must stay what it was, at every size that is tried."""
    double = model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
    runner = run_reference if double else run_ort  # ONNX Runtime's convolutions know no float64
    analysis, feeds = analysed(model, reference=double, select=select)
    known = Constants(analysis)
    keep = ~removable(analysis, known)
    edits = carry(analysis, known, keep)
    result, forgetful = cut(analysis, keep, edits), cut(analysis, keep)
    check_valid(result, model)
    naive = 0.0
    before, other = (outputs_of(model, inputs, runner)[0] for inputs in feeds[:2])
    assert distance(before, other) > 1e-2, "an output that does not follow the input proves nothing"
    for inputs in feeds:
        want = outputs_of(model, inputs, runner)
        for a, b in zip(want, outputs_of(result, inputs, runner), strict=True):
            assert np.isfinite(a).all()
            assert distance(a, b) <= (1e-10 if double else 1e-5)
        naive = max(naive, *(distance(a, b) for a, b in zip(want, outputs_of(forgetful, inputs, runner), strict=True)))
    counts = {g.name: (len(g.units), int(keep[g.units].sum())) for g in analysis.groups}
    return Exact(analysis, counts, edits, result, naive)


@dataclass
class Dead:
    """Which channels of a layer are dead, and what they hold behind the activation."""

    mask: np.ndarray
    values: np.ndarray

    @property
    def speaking(self) -> int:
        """Number of dead channels that are not zero."""
        return int((self.mask & (self.values != 0)).sum())

    def left(self, padded: bool) -> int:
        """Channels that stay: the living, and one dead one where constants must be merged."""
        return int((~self.mask).sum()) + int(padded and self.speaking > 0)


def dead_mask(net: Net, n: int, share: float = 0.6) -> np.ndarray:
    mask = np.zeros(n, bool)
    mask[net.rng.permutation(n)[: round(share * n)]] = True
    return mask


def dying(
    net: Net,
    x: str,
    channels: int,
    *,
    folded: bool = False,
    relu: bool = True,
    name: str = "",
    mask: np.ndarray | None = None,
    **attributes: object,
) -> tuple[str, Dead]:
    """A conv whose output is constant on most channels: zero scales in a BatchNorm, or folded into zero filters."""
    mask = dead_mask(net, channels) if mask is None else mask
    beta = net.random(channels, scale=0.3)
    beta = np.where(mask, beta, np.abs(beta))  # the living live
    if folded:
        weight = net.random(channels, net.dims(x)[1], 3, 3, scale=(9 * net.dims(x)[1]) ** -0.5)
        weight[mask] = 0
        y = net.op("Conv", x, weight, beta, name=name or net.unique("conv"), **attributes)
    else:
        y = net.conv(x, channels, bias=False, name=name, **attributes)
        y = net.bn(y, gamma=np.where(mask, 0, net.positive(channels)), beta=beta)
    values = np.where(mask, np.maximum(beta, 0) if relu else beta, np.nan)
    return (net.relu(y) if relu else y), Dead(mask, values)


def living(
    net: Net, x: str, channels: int = 6, kernel: int = 3, *, name: str = "consumer", **attributes: object
) -> str:
    return net.conv(x, channels, kernel, name=name, **attributes)
