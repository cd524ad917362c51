"""Damages models and runs ``slim`` on them; run as a module in a process of its own, with limits.

    python -m tests.graph_ops.fuzzing --first 0 --last 500 [--seed 0]

Prints one JSON object a line: ``{"start": i}`` before each case and ``{"case": i, ...}`` after it, so that the parent
knows which case took the process down.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper

from prune_onnx.graph_ops.errors import PruneOnnxError
from prune_onnx.pipeline import runner
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig

from .bombs import BOMBS
from .net import Net

MEMORY = 4 * 2**30
RUN_LIMIT_S = 2.0
PAD = {"pads": [1, 1, 1, 1]}
SIZES = (0, -1, 1, 2, 3, 7, 255, 2**16, 10**9, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
TEXTS = (
    "",
    "x",
    "..",
    "../model.onnx",
    "/etc/passwd",
    "\u0000",
    "\U0001f9e0",
    "a" * 5000,
    "ai.onnx.ml",
    "com.microsoft",
    "Loop",
)


# -- seeds -----------------------------------------------------------------------------------------------------------
def convolutions() -> onnx.ModelProto:
    """Most of what convolutional nets are made of."""
    net = Net(seed=1)
    y = net.relu(net.bn(net.conv(net.input(1, 3, 8, 8), 8, **PAD)))
    short = y
    z = net.relu(net.bn(net.conv(y, 12, **PAD)))
    z = net.conv(net.conv(z, 12, group=12, **PAD), 8, 1)
    y = net.relu(net.op("Add", short, z))
    a, b = net.op("Split", y, np.asarray([3, 5]), outputs=2, axis=1)
    y = net.op("Concat", b, a, short, axis=1)
    gate = net.op("Sigmoid", net.conv(net.op("GlobalAveragePool", y), 16, 1))
    y = net.op("Mul", y, gate)
    y = net.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = net.op("Pad", y, np.asarray([0, 0, 1, 1, 0, 0, 1, 1]))
    return net.model(net.gemm(net.op("Flatten", y), 5, name="head"))


def tokens() -> onnx.ModelProto:
    """A dynamic batch, sizes computed from ``Shape``, attention, a normalisation."""
    net = Net(seed=2)
    x = net.input("N", 6, 8)
    y = net.op("Add", net.matmul(x, 12), net.random(12))
    y = net.op("LayerNormalization", y, net.positive(12), net.random(12), axis=-1)
    batch = net.op("Gather", net.op("Shape", y), np.asarray([0]), axis=0)
    target = net.op("Concat", batch, np.asarray([6, 3, 4]), axis=0)
    q, k, v = (
        net.op("Transpose", net.op("Reshape", net.matmul(y, 12), target, dims=[0, 6, 3, 4]), perm=perm)
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    )
    y = net.op("MatMul", net.op("Softmax", net.op("MatMul", q, k), axis=-1), v)
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), np.asarray([0, 6, 12]))
    return net.model(net.op("ReduceMean", net.matmul(y, 5), axes=[1], keepdims=0))


def old() -> onnx.ModelProto:
    """IR version 3, values in typed fields, constants in nodes, a ConstantOfShape as a weight."""
    net = Net(seed=3, opset=9, ir=3)
    y = net.conv(net.input(1, 3, 6, 6), 4, **PAD)
    shape = net.const(np.asarray([6, 4, 1, 1]))
    weight = net.op("ConstantOfShape", shape, value=numpy_helper.from_array(np.asarray([0.5], np.float32)))
    y = net.op("LRN", net.op("Conv", y, weight, kernel_shape=[1, 1]), size=3)
    model = net.model(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", y)), 3))
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        field = "float_data" if array.dtype == np.float32 else "int64_data"
        tensor.ClearField("raw_data")
        getattr(tensor, field).extend(array.ravel().tolist())
    return model


def control() -> onnx.ModelProto:
    """A branch that reads outer weights, a loop, a function."""
    net = Net(seed=4)
    y = net.relu(net.conv(net.input(1, 3, 6, 6), 6, name="stem"))
    weight = net.const(net.random(6, 6, 1, 1))
    flag = net.const(np.asarray(True))
    branches = {}
    for name, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        nodes = [
            helper.make_node("Conv", [y, weight], [f"{name}_c"]),
            helper.make_node(op, [f"{name}_c"], [f"{name}_y"]),
        ]
        branches[name] = helper.make_graph(nodes, name, [], [_value(f"{name}_y", TensorProto.FLOAT, None)])
    z = net.op("If", flag, dims=[1, 6, 4, 4], **branches)
    net.types[z] = net.types[y]
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "s"], ["t"]), helper.make_node("Identity", ["go"], ["again"])],
        "body",
        [_value("i", TensorProto.INT64, []), _value("go", TensorProto.BOOL, []), _value("s", TensorProto.FLOAT, None)],
        [_value("again", TensorProto.BOOL, []), _value("t", TensorProto.FLOAT, None)],
    )
    z = net.op("Loop", np.asarray(2), flag, z, dims=[1, 6, 4, 4], body=body)
    net.types[z] = net.types[y]
    z = net.op("twice", net.conv(z, 6, 1), domain="own", dims=[1, 6, 4, 4])
    model = net.model(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", z)), 3))
    model.functions.append(
        helper.make_function(
            "own", "twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
        )
    )
    return model


_value = helper.make_tensor_value_info


def quantised() -> onnx.ModelProto:
    """Weights and activations through QuantizeLinear and DequantizeLinear."""
    net = Net(seed=5)
    y = net.input(1, 3, 6, 6)
    for n, cin in ((8, 3), (6, 8)):
        q = net.op("QuantizeLinear", y, np.asarray(0.05, np.float32), np.asarray(3, np.uint8))
        x = net.op("DequantizeLinear", q, np.asarray(0.05, np.float32), np.asarray(3, np.uint8))
        codes = net.rng.integers(-90, 90, (n, cin, 3, 3)).astype(np.int8)
        w = net.op("DequantizeLinear", codes, net.positive(n) * 0.01, np.zeros(n, np.int8), axis=0)
        y = net.relu(net.op("Conv", x, w, net.random(n), **PAD))
    return net.model(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", y)), 3))


def pruned() -> onnx.ModelProto:
    """What ``slim`` left: it carries a history, which is read again."""
    model = convolutions()
    model.metadata_props.add(key="prune_onnx.slim", value=json.dumps([{"budget": "exact"}]))
    return model


SEEDS: dict[str, Callable[[], onnx.ModelProto]] = {
    f.__name__: f for f in (convolutions, tokens, old, control, quantised, pruned)
}


# -- damage ----------------------------------------------------------------------------------------------------------
def damage_bytes(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Flip, cut, copy or insert bytes."""
    out = bytearray(data)
    kind = rng.integers(6)
    a, b = sorted(rng.integers(0, len(out) + 1, 2).tolist())
    b = min(b, a + int(2 ** rng.uniform(0, 10)))
    if kind <= 1:
        for _ in range(int(2 ** rng.uniform(0, 5))):
            out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        del out[int(rng.integers(len(out))) :]
    elif kind == 3:
        del out[a:b]
    elif kind == 4:
        out[a:a] = out[a:b]
    else:
        start = int(rng.integers(len(other)))
        out[a:b] = other[start : start + int(2 ** rng.uniform(0, 10))]
    return bytes(out)


def messages(message: Message) -> Iterator[Message]:
    """Every message inside a message, itself included."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from messages(inner)


def damage_message(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Change one field somewhere."""
    every = list(messages(model))
    # Most messages are nodes and names; let sizes and tensors be hit as often.
    kinds = sorted({m.DESCRIPTOR.name for m in every})
    kind = kinds[rng.integers(len(kinds))]
    among = [m for m in every if kind == m.DESCRIPTOR.name]
    message = among[rng.integers(len(among))]
    names = [t for m in every if m.DESCRIPTOR.name == "NodeProto" for t in [*m.input, *m.output]]
    fields = [f for f, _ in message.ListFields()] if rng.random() < 0.8 else list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = fields[rng.integers(len(fields))]
    if field.is_repeated:
        _damage_list(getattr(message, field.name), field, rng, names)
    elif rng.random() < 0.25:
        message.ClearField(field.name)
    elif field.message_type is None:
        _assign(lambda value: setattr(message, field.name, value), getattr(message, field.name), field, rng, names)


def _damage_list(values: Any, field: FieldDescriptor, rng: np.random.Generator, names: list[str]) -> None:
    n = len(values)
    i = int(rng.integers(n)) if n else 0
    action = rng.integers(5)
    if action == 0 and n:
        del values[i]
    elif action == 1 and n:
        values.extend([values[i]])
    elif action == 2 and n > 1:
        kept = list(values)
        rng.shuffle(kept)
        kept = [type(v).FromString(v.SerializeToString()) if isinstance(v, Message) else v for v in kept]
        del values[:]
        values.extend(kept)
    elif action == 3 and n:
        del values[i:]
    elif field.message_type is None:
        if n:
            _assign(lambda value: values.__setitem__(i, value), values[i], field, rng, names)
        else:
            _assign(values.append, None, field, rng, names)


def _assign(
    put: Callable[[Any], None], old: Any, field: FieldDescriptor, rng: np.random.Generator, names: list[str]
) -> None:
    """Give a scalar another value of its type, as odd as possible."""
    kind = field.cpp_type
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        value: Any = (float("nan"), float("inf"), -1.0, 0.0, 1e30)[rng.integers(5)]
    elif kind == FieldDescriptor.CPPTYPE_ENUM:
        value = int(rng.integers(0, 30))
    elif kind == FieldDescriptor.CPPTYPE_STRING and field.type == FieldDescriptor.TYPE_BYTES:
        old = old or b""
        value = (b"", old[: len(old) // 2], old + b"\x00" * 4, old + b"\xff" * 4096, b"SAME_UPPER")[rng.integers(5)]
    elif kind == FieldDescriptor.CPPTYPE_STRING:
        value = names[rng.integers(len(names))] if names and rng.random() < 0.6 else TEXTS[rng.integers(len(TEXTS))]
    else:
        value = SIZES[rng.integers(len(SIZES))] if rng.random() < 0.7 else int(old or 0) + int(rng.integers(-2, 3))
    try:
        put(value)
    except (ValueError, TypeError):  # out of the field's range: protobuf itself does not write that
        put(type(old)() if old is not None else 1)


def damage_external(folder: Path, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Store the weights outside and lie about where."""
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    stored = onnx.load(path, load_external_data=False)
    data = folder / "weights.bin"
    tensors = [t for t in stored.graph.initializer if t.external_data]
    tensor = tensors[rng.integers(len(tensors))]
    entry = tensor.external_data[rng.integers(len(tensor.external_data))]
    action = rng.integers(7)
    if action <= 1:
        entry.value = (
            "../weights.bin",
            "/etc/passwd",
            "",
            ".",
            "weights.bin/../../x",
            "-1",
            "1e3",
            "99999999999999999999",
            "4097",
            "\u0000",
            "model.onnx",
            "nothing.bin",
        )[rng.integers(12)]
    elif action == 2:
        entry.key = ("location", "offset", "length", "checksum", "")[rng.integers(5)]
    elif action == 3:
        del tensor.external_data[:]
    elif action == 4:
        data.write_bytes(data.read_bytes()[: int(rng.integers(data.stat().st_size))])
    elif action == 5:
        data.unlink()
        data.symlink_to((Path("/etc/hostname"), folder / "missing", folder / "weights.bin", folder)[rng.integers(4)])
    else:
        damage_message(stored, rng)
    path.write_bytes(stored.SerializeToString())


def write_case(folder: Path, i: int, seed: int) -> str:
    """Write the damaged model of case ``i``; return what it was made from."""
    rng = np.random.default_rng([seed, i])
    name, other = (list(SEEDS)[k] for k in rng.permutation(len(SEEDS))[:2])
    model = SEEDS[name]()
    way = rng.random()
    if way < 0.3:
        data = damage_bytes(model.SerializeToString(), rng, SEEDS[other]().SerializeToString())
        (folder / "model.onnx").write_bytes(data)
        return f"{name}, bytes"
    for _ in range(int(rng.integers(1, 4))):
        damage_message(model, rng)
    if way < 0.85 or not model.graph.initializer:
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return f"{name}, fields"
    try:
        damage_external(folder, SEEDS[name](), rng)
    except (ValueError, OSError):  # the seed cannot be stored that way
        (folder / "model.onnx").write_bytes(model.SerializeToString())
    return f"{name}, external data"


def write_bomb(folder: Path, name: str) -> str:
    """Write one of the files that ask for much."""
    model = BOMBS[name]()
    (folder / "model.onnx").write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return name


# -- one case --------------------------------------------------------------------------------------------------------
def run_case(i: int, make: Callable[[Path], str]) -> dict[str, Any]:
    """Run one case and say how it ended; ``fault`` is there when it ended as it must not.

    Args:
        i: its number, by which the options are chosen.
        make: writes ``model.onnx`` into a folder and says what it was made from.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make(folder)
        before = sorted(p.name for p in folder.iterdir())
        content = (folder / "model.onnx").read_bytes()
        options: dict[str, Any] = (
            {"keep_channels": 0.5},
            {"keep_macs": 0.6, "norms": "release"},
            {"exact": True},
            {"select_inputs": True, "keep_params": 0.7},
            {"fold_bn": True},
        )[i % 5]
        report: dict[str, Any] = {"case": i, "made": made}
        started = time.process_time()
        try:
            slim(SlimConfig(input=folder / "model.onnx", output=folder / "out.onnx", align=1, **options))
            report["end"] = "written"
            onnx.checker.check_model(str(folder / "out.onnx"))
        except PruneOnnxError as error:
            report["end"] = type(error).__name__
            report["message"] = str(error)[:300]
            if not str(error).strip() or "Traceback" in str(error):
                report["fault"] = f"no useful message: {error!r}"
        except BaseException:
            report["end"] = "other exception"
            report["fault"] = "".join(traceback.format_exc()[-1500:])
        report["seconds"] = round(time.process_time() - started, 3)
        after = sorted(p.name for p in folder.iterdir())
        allowed = [*before, "out.onnx", "out.onnx.data"] if report["end"] == "written" else before
        if set(after) - set(allowed) or set(before) - set(after):
            report["fault"] = f"files after {report['end']}: {after}. {report.get('fault', '')}"
        if (folder / "model.onnx").read_bytes() != content:
            report["fault"] = f"the input was changed. {report.get('fault', '')}"
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int, default=0, help="run on this one of the cores that the process may use")
    parser.add_argument("--bombs", action="store_true", help="run those instead")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[options.core % len(cores)]})
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    runner.LIMIT_S = RUN_LIMIT_S
    for i in range(options.first, options.last):
        print(json.dumps({"start": i}), flush=True)
        make = functools.partial(write_case, i=i, seed=options.seed)
        if options.bombs:
            make = functools.partial(write_bomb, name=list(BOMBS)[i])
        print(json.dumps(run_case(i, make)), flush=True)


if __name__ == "__main__":
    main()
