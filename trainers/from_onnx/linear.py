"""Convolutions and products of matrices, with weights of any origin; the network's own are in :mod:`.layers`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ModelError

from .base import MICROSOFT, Operation, Tensor, operator
from .windows import Window, by_rank, pad

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "LeakyRelu": F.leaky_relu,
    "Clip": torch.clamp,
    "HardSigmoid": lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1),
}


@operator("Conv")
def conv(op: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    window = Window.of(op, weight.shape[2:])
    rank = len(window.kernel)
    convolve = by_rank((F.conv1d, F.conv2d, F.conv3d), rank, op)
    padding = window.pads[:rank] if window.symmetric else (0,) * rank
    if not window.symmetric:
        x = pad(x, window.padding(x.shape[2:]))
    return convolve(x, weight, bias, window.strides, padding, window.dilations, op.attribute("group", 1))


@operator("FusedConv", domain=MICROSOFT)
def fused_conv(
    op: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Convolve, add another tensor, and activate."""
    y = conv(op, x, weight, bias)
    y = y if residual is None else y + residual
    name = op.attribute("activation", "")
    if name and name not in ACTIVATIONS:
        raise ModelError(f"{op.node} fuses the activation {name!r}, which cannot be trained.")
    return ACTIVATIONS[name](y, *op.attribute("activation_params", ())) if name else y


@operator("ConvTranspose")
def conv_transpose(op: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Transposed convolution: torch's without padding, cut, or extended by zeros, to the size that is asked for."""
    window = Window.of(op, weight.shape[2:])
    rank = len(window.kernel)
    convolve = by_rank((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), rank, op)
    extra = op.attribute("output_padding") or (0,) * rank
    pads = _transposed_padding(op, window, list(x.shape[2:]), extra)
    group = op.attribute("group", 1)
    if pads[:rank] == pads[rank:] and not any(extra) and min(pads) >= 0:
        return convolve(x, weight, bias, window.strides, pads[:rank], 0, group, window.dilations)
    y = convolve(x, weight, None, window.strides, 0, 0, group, window.dilations)
    ends = (e - p for e, p in zip(extra, pads[rank:], strict=True))
    y = pad(y, (*(-p for p in pads[:rank]), *ends))
    return y if bias is None else y + bias.view(-1, *[1] * rank)


def _transposed_padding(op: Operation, window: Window, sizes: list[int], extra: tuple[int, ...]) -> tuple[int, ...]:
    """Return what is cut off, (begin, ..., end, ...): the node's pads, or what its output size leaves over."""
    wanted = op.attribute("output_shape")
    if wanted is None and window.auto.startswith("SAME"):
        wanted = [size * stride for size, stride in zip(sizes, window.strides, strict=True)]
    if wanted is None:
        return window.pads
    begins, ends = [], []
    for axis, size in enumerate(wanted[-len(sizes) :]):
        total = window.strides[axis] * (sizes[axis] - 1) + extra[axis] + window.extents[axis] - size
        half = max(total, 0) // 2
        begins.append(half if window.auto == "SAME_UPPER" else max(total, 0) - half)
        ends.append(total - begins[-1])
    return (*begins, *ends)


@operator("Gemm")
def gemm(op: Operation, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.t() if op.attribute("transA", 0) else a
    b = b.t() if op.attribute("transB", 0) else b
    alpha, beta = op.attribute("alpha", 1.0), op.attribute("beta", 1.0)
    y = a @ b if alpha == 1 else alpha * (a @ b)
    return y if c is None else y + (c if beta == 1 else beta * c)


@operator("MatMul")
def matmul(op: Operation, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@operator("Einsum")
def einsum(op: Operation, *inputs: Tensor) -> Tensor:
    return torch.einsum(op.attribute("equation"), *inputs)


@operator("Attention")
def attention(op: Operation, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *past: Tensor) -> Tensor:
    """Scaled dot products of (batch, heads, length, size), or of (batch, length, heads * size) with counts of heads."""
    if past or op.attribute("softcap", 0.0) or len([name for name in op.node.outputs if name]) > 1:
        raise ModelError(f"{op.node} keeps a past, caps its scores or gives them out, which cannot be trained.")
    flat = q.dim() == 3
    if flat:
        heads = [op.attribute("q_num_heads"), op.attribute("kv_num_heads"), op.attribute("kv_num_heads")]
        q, k, v = (x.unflatten(2, (n, -1)).transpose(1, 2) for x, n in zip((q, k, v), heads, strict=True))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    causal = bool(op.attribute("is_causal", 0))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=op.attribute("scale"))
    return y.transpose(1, 2).flatten(2) if flat else y
