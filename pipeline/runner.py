"""Runs a model whose weights stay where they are.

The larger initializers are fed like inputs, from the arrays or mapped files that hold them already: no second copy
inside a protobuf message, none inside the session, and no 2 GB limit. For test runs, not for measuring speed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import onnx

from prune_onnx.graph_ops.graph import tensor_value
from prune_onnx.graph_ops.memory import give_back
from prune_onnx.graph_ops.model_io import split_weights

from .sessions import create_session, one_line

# Seconds after which a test run is given up: a loop that was meant to end has done so by then.
LIMIT_S = 600.0


class RunError(Exception):
    """The model does not run on these inputs; the message is ONNX Runtime's, in one line."""


class Runner:
    """A model in ONNX Runtime on the CPU, without graph optimisations.

    Attributes:
        outputs: names of the graph outputs.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        expose: Sequence[str] = (),
        nodes: Sequence[onnx.NodeProto] = (),
        constants: Sequence[onnx.TensorProto] = (),
    ) -> None:
        """Open a session.

        Args:
            model: what to run.
            expose: tensors that are wanted beside the graph outputs.
            nodes: nodes to run in addition.
            constants: what those read.

        Raises:
            ModelError: ONNX Runtime does not take the model.
        """
        skeleton, weights = split_weights(model)
        self.outputs = [o.name for o in skeleton.graph.output]
        _insert(skeleton.graph, nodes)
        skeleton.graph.initializer.extend(constants)
        self._weights = {tensor.name: tensor_value(tensor) for tensor in weights}
        for name in expose:
            if name not in self.outputs:
                skeleton.graph.output.append(onnx.ValueInfoProto(name=name))
        self._session = create_session(skeleton, "cpu", optimize=False, arena=False)
        del skeleton
        give_back()
        self._read = {i.name for i in self._session.get_inputs()}

    def run(self, names: Sequence[str] | None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the named tensors (all graph outputs for ``None``); nothing that they do not need is computed.

        Raises:
            RunError: the model fails on these inputs, or takes longer than ``LIMIT_S``.
        """
        from onnxruntime import RunOptions

        weights = {name: value for name, value in self._weights.items() if name in self._read}
        options = RunOptions()
        options.only_execute_path_to_fetches = True
        watch = threading.Timer(LIMIT_S, setattr, (options, "terminate", True))
        watch.daemon = True
        watch.start()
        try:
            return self._session.run(list(names) if names is not None else self.outputs, {**weights, **feeds}, options)
        except Exception as error:  # onnxruntime's exceptions share no base class
            if options.terminate:
                raise RunError(f"it was stopped after {LIMIT_S:g} s") from error
            raise RunError(one_line(error)) from error
        finally:
            watch.cancel()


def _insert(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put each node behind the one that makes its first input: it then runs while that is at hand."""
    followers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        followers.setdefault(node.input[0], []).append(node)
    own = list(graph.node)
    del graph.node[:]
    given = [*(i.name for i in graph.input), *(t.name for t in graph.initializer)]
    graph.node.extend(f for name in given for f in followers.get(name, ()))
    for node in own:
        graph.node.append(node)
        graph.node.extend(f for name in node.output for f in followers.get(name, ()))
