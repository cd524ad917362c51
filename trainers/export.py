"""From a torch network to one ONNX file that keeps what pruning needs to see.

torch's exporter folds BatchNormalization into the layer before it, and with that the scales are gone that the trainers
made sparse. Here its optimisation is off; what remains of it is constant folding and the few rewrites of
:data:`TIDY`, none of which touches a weight. Weights keep the names of torch's parameters, and the nodes that use them
the names of torch's modules, so that a report speaks of ``features.0`` and not of ``node_Conv_81``.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch
from torch import nn

from prune_onnx.graph_ops import gammas, preprocessing
from prune_onnx.graph_ops.errors import ModelError
from prune_onnx.graph_ops.files import write_bytes
from prune_onnx.graph_ops.preprocessing import Preprocessing

if TYPE_CHECKING:
    import onnx_ir

OPSET = 18
"""What torch's exporter writes natively; every onnxruntime since 1.14 runs it."""

TIDY = (
    "remove_optional_bias_from_conv_rule",  # Conv without bias is written with a bias of zeros
    "collapse_slice_rule",  # x[:, :, ::2] is written with a Slice for each axis
    "materialize_reshape_shape_rule",  # flatten(1) computes its shape at run time, for the sake of the batch size
)
"""Rewrites of onnxscript that leave weights alone. One that an older onnxscript lacks is left out: it only tidies."""

EXAMPLE_BATCH = 2
"""torch takes sizes 0 and 1 of an example for constants."""


def export_onnx(
    model: nn.Module,
    in_shape: tuple[int, int, int],
    path: str | Path | None,
    recipe: Preprocessing,
    metadata: Mapping[str, str],
) -> onnx.ModelProto:
    """Return the network, in evaluation mode, as an ONNX model; the network itself is left as it is.

    The model has one input ``input`` of shape (batch, C, H, W), float32, with a dynamic batch size, and one output
    ``logits``.

    Args:
        model: takes (N, C, H, W), returns (N, classes).
        in_shape: (C, H, W).
        path: where the file goes, as one file; ``None`` writes none.
        recipe: how images become the input; goes into the model's metadata.
        metadata: provenance; each key is written as ``prune_onnx.<key>``.

    Raises:
        ModelError: torch cannot export the network.
        OutputError: the file cannot be written.
    """
    network = copy.deepcopy(model).cpu().float().eval()
    network = network.to(memory_format=torch.contiguous_format)  # channels last, flatten(1) would become a Gather
    example = torch.zeros(EXAMPLE_BATCH, *in_shape)
    with _quiet():
        try:
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        except Exception as error:  # the exporter wraps whatever goes wrong in its stages in classes of its own
            raise ModelError(f"torch cannot export this network to ONNX: {_root_cause(error)}") from error
        _tidy(program.model)
        proto = program.model_proto
    _strip_metadata(proto)
    _name_nodes_by_weights(proto.graph)
    proto.producer_name, proto.producer_version = "prune-onnx", metadata.get("version", "")
    preprocessing.write(proto, recipe)
    gammas.keep_present(proto)
    for key, value in metadata.items():
        proto.metadata_props.add(key=f"prune_onnx.{key}", value=value)
    onnx.checker.check_model(proto, full_check=True)
    if path is not None:
        write_bytes(path, proto.SerializeToString())
    return proto


def _tidy(model: onnx_ir.Model) -> None:
    """Fold constants and apply :data:`TIDY` until nothing is left over of the exporter's bookkeeping, in place."""
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common

    rules = [getattr(common, name) for name in TIDY if hasattr(common, name)]
    optimizer.fold_constants(model)
    rewriter.rewrite(model, rules)
    # A Reshape that got its shape as a constant leaves the nodes that computed it behind.
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)


def _strip_metadata(proto: onnx.ModelProto) -> None:
    """Take off the exporter's notes (source lines with local paths, Python classes) and its types of the weights."""
    graph = proto.graph
    weights = {initializer.name for initializer in graph.initializer}
    shapes = [value for value in graph.value_info if value.name not in weights]
    graph.ClearField("value_info")
    graph.value_info.extend(shapes)
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _name_nodes_by_weights(graph: onnx.GraphProto) -> None:
    """Give each node that uses weights of a torch module the module's name, as long as that is free."""
    weights = {initializer.name for initializer in graph.initializer}
    taken: set[str] = {node.name for node in graph.node}
    for node in graph.node:
        owners = [name.rpartition(".")[0] for name in node.input if name in weights and "." in name]
        if owners and owners[0] not in taken:
            node.name = owners[0]
            taken.add(node.name)


def _root_cause(error: BaseException) -> str:
    """Return the first line of what went wrong first; the exporter wraps it in advice on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter: it logs what is not installed, warns of its internals, and prints what it gave up on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
