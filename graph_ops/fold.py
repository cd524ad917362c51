"""Fold BatchNormalization into the Conv, ConvTranspose or Gemm before it.

    y = (W x + b - mean) * s + beta,  s = scale / sqrt(var + epsilon)
    W' = s * W,  b' = (b - mean) * s + beta        (s runs along the output channels)

Exact in real arithmetic for any padding, because the normalisation comes after the sum.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from . import gammas, surgeon


def fold_batch_norm(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Return a model with its foldable BatchNormalization nodes folded, and how many there were.

    A BatchNormalization is foldable when the sum in front of it has no other reader and all parameters are constants.
    The scales, which are lost with that, are kept in the metadata (:mod:`.gammas`).

    Raises:
        ModelError: the model holds tensor types that cannot be edited.
    """
    scales: dict[str, np.ndarray] = {}

    def change(graph: gs.Graph) -> None:
        for node in list(graph.nodes):
            if node.op == "BatchNormalization":
                out, scale = node.outputs[0].name, _value(node.inputs[1])
                if _fold(node, graph):
                    scales[out] = scale

    result = surgeon.edit(model, change)
    if not scales:
        return model, 0
    gammas.write(result, {**gammas.read(result), **scales})
    return result, len(scales)


def _fold(norm: gs.Node, graph: gs.Graph) -> bool:
    x = norm.inputs[0]
    if len(x.inputs) != 1 or len(x.outputs) != 1 or any(x is out for out in graph.outputs):
        return False
    before = x.inputs[0]
    if before.op not in ("Conv", "ConvTranspose", "Gemm") or norm.attrs.get("training_mode", 0):
        return False
    if before.op == "Gemm" and (before.attrs.get("alpha", 1.0) != 1.0 or before.attrs.get("beta", 1.0) != 1.0):
        return False
    parameters = [_value(p) for p in (*norm.inputs[1:5], *before.inputs[1:])]
    if any(p is None for p in parameters):
        return False
    weight = parameters[4]
    scale, beta, mean, var = (p.astype(np.float64) for p in parameters[:4])
    factor = scale / np.sqrt(var + norm.attrs.get("epsilon", 1e-5))
    bias = parameters[5].astype(np.float64) if len(parameters) > 5 else 0.0
    shift = (bias - mean) * factor + beta
    new_weight = scaled_outputs(
        before.op,
        weight.astype(np.float64),
        factor,
        groups=before.attrs.get("group", 1),
        transposed=bool(before.attrs.get("transB", 0)),
    ).astype(weight.dtype)
    name = before.inputs[1].name
    before.inputs = [
        before.inputs[0],
        gs.Constant(_free(graph, f"{name}_folded"), new_weight),
        gs.Constant(_free(graph, f"{name}_bias_folded"), shift.astype(weight.dtype)),
    ]
    # A layer without a name goes by its output's (see Graph), which changes now; reports and --ignore go on with it.
    before.name = before.name or f"{before.op}({x.name})"
    # The BN's output keeps its name: it may be a graph output or be read by name elsewhere.
    out = norm.outputs[0]
    norm.outputs.clear()
    before.outputs = [out]
    return True


def _value(tensor: gs.Tensor) -> np.ndarray | None:
    """Value of an initializer or of a Constant node's output, ``None`` for anything else."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    if tensor.inputs and tensor.inputs[0].op == "Constant" and "value" in tensor.inputs[0].attrs:
        return np.asarray(tensor.inputs[0].attrs["value"].values)
    return None


def scaled_outputs(
    op_type: str, weight: np.ndarray, factor: np.ndarray, *, groups: int = 1, transposed: bool = False
) -> np.ndarray:
    """Multiply every output channel's weights by its factor.

    Args:
        op_type: ``Conv``, ``ConvTranspose`` or ``Gemm``.
        weight: as the operator stores it.
        factor: one per output channel.
        groups: of a convolution.
        transposed: whether a Gemm stores (out, in).
    """
    if op_type == "Gemm":
        return weight * (factor[:, None] if transposed else factor[None, :])
    if op_type == "Conv":
        return weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    # ConvTranspose: (in, out / group, *kernel); input row i belongs to group i // (in / group).
    per_row = factor.reshape(groups, -1).repeat(weight.shape[0] // groups, axis=0)
    return weight * per_row.reshape(*per_row.shape, *[1] * (weight.ndim - 2))


def _free(graph: gs.Graph, wish: str) -> str:
    taken = graph.tensors()
    name, n = wish, 0
    while name in taken:
        n += 1
        name = f"{wish}{n}"
    return name
