"""Runs a model whose weights stay where they are.

The larger initializers are fed like inputs, from the arrays or mapped files that hold them already: no second copy inside
a protobuf message, none inside the session, and no 2 GB limit. For test runs, not for measuring speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from prune_onnx.graph_ops.graph import tensor_value
from prune_onnx.graph_ops.model_io import split_weights

from .sessions import create_session, one_line


class RunError(Exception):
    """The model does not run on these inputs; the message is ONNX Runtime's, in one line."""


class Runner:
    """A model in ONNX Runtime on the CPU, without graph optimisations.

    Attributes:
        outputs: names of the graph outputs.
    """

    def __init__(self, model: onnx.ModelProto, expose: Sequence[str] = ()) -> None:
        """Open a session.

        Args:
            model: what to run.
            expose: tensors that are wanted beside the graph outputs.

        Raises:
            ModelError: ONNX Runtime does not take the model.
        """
        skeleton, weights = split_weights(model)
        self.outputs = [o.name for o in skeleton.graph.output]
        self._weights = {tensor.name: tensor_value(tensor) for tensor in weights}
        for name in expose:
            if name not in self.outputs:
                skeleton.graph.output.append(onnx.ValueInfoProto(name=name))
        self._session = create_session(skeleton, "cpu", optimize=False, arena=False)
        self._read = {i.name for i in self._session.get_inputs()}

    def run(self, names: Sequence[str] | None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the named tensors (all graph outputs for ``None``).

        Raises:
            RunError: the model fails on these inputs.
        """
        weights = {name: value for name, value in self._weights.items() if name in self._read}
        try:
            return self._session.run(list(names) if names is not None else self.outputs, {**weights, **feeds})
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise RunError(one_line(error)) from error
