"""BatchNorm scales, in the graph or kept in the metadata of a graph whose BatchNorms were folded."""

from __future__ import annotations

import numpy as np

from .. import gammas
from ..errors import ConfigError
from .base import Evidence, Scores, Total, criterion


@criterion("bn-gamma", comparable=True)
def bn_gamma(evidence: Evidence) -> Scores:
    """Absolute BatchNorm scale, ranked over the net (Network Slimming, Liu et al. 2017).

    Coupled scales add up. Global: as they are, for that is what the sparse training makes comparable. Where the
    BatchNorms were folded, the scales that ``train`` and ``slim`` leave in the metadata are read.
    """
    analysis = evidence.analysis
    total = Total(analysis.units)
    found = False
    noted = gammas.read(analysis.graph.model)
    for operand in analysis.operands:
        if operand.node.op_type == "BatchNormalization" and operand.input == 1:
            scale = np.abs(np.asarray(analysis.value(operand.node.inputs[1]), np.float64))
            total.add(operand.axes[0], scale)
            noted.pop(operand.node.outputs[0], None)
            found = True
    for tensor, scale in noted.items():
        labels = analysis.axes.get(tensor, {}).get(1)
        if labels is not None and len(labels) == len(scale):
            total.add(labels, np.abs(scale.astype(np.float64)))
            found = True
    if not found:
        raise ConfigError(
            "criterion 'bn-gamma' needs BatchNormalization nodes and the graph has none (exporters fold "
            "them into the convolutions), nor scales in its metadata. Export with BN kept, or use --criterion l2."
        )
    return total.sum()
