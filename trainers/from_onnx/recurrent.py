"""Recurrent layers, step by step, with their default activations.

Weights of each direction: W (gates * hidden, inputs), R (gates * hidden, hidden), B the biases of both, one after the
other. Gate order: LSTM input, output, forget, cell; GRU update, reset, hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ModelError

from .base import Operation, Outputs, Tensor, operator

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State], State]
PLAIN = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def _check(op: Operation, lengths: Tensor | None) -> None:
    """Refuse the settings that no exporter of a vision network writes.

    Raises:
        ModelError: one is set.
    """
    directions = 2 if op.attribute("direction", "forward") == "bidirectional" else 1
    names = [name.decode() if isinstance(name, bytes) else name for name in op.attribute("activations") or []]
    special = [name for name in ("clip", "activation_alpha", "input_forget", "layout") if op.attribute(name)]
    if names and names != PLAIN[op.op_type] * directions:
        special.append("activations")
    if lengths is not None:
        special.append("sequence_lens")
    if special:
        raise ModelError(f"{op.node} sets {', '.join(special)}, which cannot be trained.")


def _run(
    op: Operation, x: Tensor, initial: list[Tensor | None], weights: list[Tensor], cell: Callable[..., State]
) -> tuple[Tensor, list[Tensor]]:
    """Run all directions over a sequence (T, N, inputs); return outputs (T, directions, N, hidden) and last states."""
    hidden = op.attribute("hidden_size")
    direction = op.attribute("direction", "forward")
    outputs, lasts = [], []
    for index in range(len(weights[0])):
        backward = direction == "reverse" or index == 1
        state = tuple(x.new_zeros(x.shape[1], hidden) if s is None else s[index] for s in initial)
        parts = [None if w is None else w[index] for w in weights]
        made = []
        for step in reversed(range(len(x))) if backward else range(len(x)):
            state = cell(x[step], state, *parts)
            made.append(state[0])
        outputs.append(torch.stack(made[::-1] if backward else made))
        lasts.append(state)
    return torch.stack(outputs, 1), [torch.stack(states) for states in zip(*lasts, strict=True)]


@operator("LSTM")
def lstm(
    op: Operation, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    h: Tensor | None = None, c: Tensor | None = None, peepholes: Tensor | None = None,
) -> Outputs:  # fmt: skip
    _check(op, lengths)
    if peepholes is not None:
        raise ModelError(f"{op.node} has peepholes, which cannot be trained.")

    def cell(x: Tensor, state: State, w: Tensor, r: Tensor, b: Tensor | None) -> State:
        before, memory = state
        biases = (None, None) if b is None else b.chunk(2)
        gates = F.linear(x, w, biases[0]) + F.linear(before, r, biases[1])
        i, o, f, g = gates.chunk(4, 1)
        memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(memory), memory

    y, (last, memory) = _run(op, x, [h, c], [w, r, b] if b is not None else [w, r, [None] * len(w)], cell)
    return y, last, memory


@operator("GRU")
def gru(
    op: Operation, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> Outputs:  # fmt: skip
    _check(op, lengths)
    after = bool(op.attribute("linear_before_reset", 0))

    def cell(x: Tensor, state: State, w: Tensor, r: Tensor, b: Tensor | None) -> State:
        (before,) = state
        mine, theirs = (None, None) if b is None else b.chunk(2)
        z, s, n = F.linear(x, w, mine).chunk(3, 1)
        kernels = r.chunk(3)
        shifts = (None, None, None) if theirs is None else theirs.chunk(3)
        z = torch.sigmoid(z + F.linear(before, kernels[0], shifts[0]))
        s = torch.sigmoid(s + F.linear(before, kernels[1], shifts[1]))
        back = s * F.linear(before, kernels[2], shifts[2]) if after else F.linear(s * before, kernels[2], shifts[2])
        return ((1 - z) * torch.tanh(n + back) + z * before,)

    y, (last,) = _run(op, x, [h], [w, r, b] if b is not None else [w, r, [None] * len(w)], cell)
    return y, last


@operator("RNN")
def rnn(
    op: Operation, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> Outputs:  # fmt: skip
    _check(op, lengths)

    def cell(x: Tensor, state: State, w: Tensor, r: Tensor, b: Tensor | None) -> State:
        biases = (None, None) if b is None else b.chunk(2)
        return (torch.tanh(F.linear(x, w, biases[0]) + F.linear(state[0], r, biases[1])),)

    y, (last,) = _run(op, x, [h], [w, r, b] if b is not None else [w, r, [None] * len(w)], cell)
    return y, last
