"""Times of single layers at a few widths, measured once for each provider and machine and kept in a file.

On the CPU one small model holds a layer at all its widths, and ONNX Runtime's profiler tells what each of them took:
that leaves out what a run costs beside its kernels, and the reordering of tensors at the model's ends. Weights come
from memory as they do in a network. On a GPU, where the profiler sees only the launch, every point is a model of its
own with inputs and outputs in device memory, and the time of a model that does nothing is taken off.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from prune_onnx.graph_ops.errors import OutputError
from prune_onnx.graph_ops.files import write_text
from prune_onnx.graph_ops.latency_model import Layer, Point, Table
from prune_onnx.graph_ops.progress import Progress

from .bench import warm_up
from .environment import capture
from .execution import Execution
from .sessions import create_session

SCHEMA_VERSION = 1
OPSET = 17
# A layer is timed in this many passes over all layers, so that one disturbance of the machine cannot spoil it: what
# counts is the quicker pass. In each it runs this often at least, and for this long in all its widths together, unless
# that takes too long.
PASSES = 2
RUNS = 8
SECONDS = 0.06
MOST_SECONDS = 1.0
# Of the runs of a pass the quickest part counts.
QUICK = 0.25
# A layer's kernel in a profile; optimisations add to the name.
_KERNEL = re.compile(r"layer(\d+)(?:_[a-z]\w*)?_kernel_time")


class Timer(Protocol):
    """Measures a layer."""

    def times(self, layer: Layer, points: Sequence[Point]) -> list[float]:
        """Return the seconds of the layer at each point."""


class ProviderTimer:
    """Measures layers in ONNX Runtime.

    Args:
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        threads: of the CPU provider; ``None`` is ONNX Runtime's choice.
    """

    def __init__(self, provider: str, threads: int | None) -> None:
        self.provider, self.threads = provider, threads
        self._idle: float | None = None

    def times(self, layer: Layer, points: Sequence[Point]) -> list[float]:
        """Return the seconds of the layer at each point."""
        if self.provider == "cpu" and (profiled := self._profiled(layer, points)) is not None:
            return profiled
        if self._idle is None:
            empty = helper.make_node("Identity", ["x"], ["y"])
            self._idle = self._alone(_model([empty], {"x": [1]}, {"y": [1]}, []), {"x": np.zeros(1, np.float32)})
        found = []
        for point in points:
            model, feeds = layer_model(layer, [point])
            found.append(max(self._alone(model, feeds) - self._idle, 1e-7))
        return found

    def _alone(self, model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> float:
        run = Execution(provider=self.provider, threads=self.threads).runner(model, feeds)
        warm_up(run)
        samples: list[float] = []
        while len(samples) < RUNS or (sum(samples) < SECONDS / 4 and len(samples) < 1000):
            samples.append(run())
        return _quick(samples)

    def _profiled(self, layer: Layer, points: Sequence[Point]) -> list[float] | None:
        model, feeds = layer_model(layer, points)
        ort = _runtime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.enable_profiling = True
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        with tempfile.TemporaryDirectory() as folder:
            options.profile_file_prefix = str(Path(folder) / "layer")
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            started, runs = time.perf_counter(), 0
            while True:
                session.run(["sum"], dict(feeds))
                runs += 1
                spent = time.perf_counter() - started
                if (runs >= RUNS and spent > SECONDS) or (runs > 3 and spent > MOST_SECONDS):
                    break
            events = json.loads(Path(session.end_profiling()).read_text())
        return _kernel_times(events, len(points))


def _runtime() -> Any:
    """ONNX Runtime, through the module that knows how to import it."""
    create_session(_model([helper.make_node("Identity", ["x"], ["y"])], {"x": [1]}, {"y": [1]}, []))
    import onnxruntime

    return onnxruntime


def _kernel_times(events: Sequence[Mapping[str, Any]], count: int) -> list[float] | None:
    """Seconds of the layers named ``layer0``, ``layer1``, ... in a profile; ``None`` when one does not appear in it."""
    samples: list[list[float]] = [[] for _ in range(count)]
    for event in events:
        if found := _KERNEL.fullmatch(event.get("name", "")):
            samples[int(found[1])].append(event["dur"] * 1e-6)
    if not all(len(s) > 1 for s in samples):
        return None
    return [max(_quick(s[1:]), 1e-7) for s in samples]


def _quick(samples: Sequence[float]) -> float:
    """The mean of the quickest samples: the profiler counts whole microseconds, so it is finer than any one of them."""
    return float(np.mean(np.sort(samples)[: max(1, round(QUICK * len(samples)))]))


def layer_model(layer: Layer, points: Sequence[Point]) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return a model that holds the layer at every point, nodes ``layer0``, ``layer1``, ..., and its inputs.

    The outputs are summed up, one number each, so that none is copied out.
    """
    rng = np.random.default_rng(0)
    nodes, weights, feeds, last = [], [], {}, []
    for i, (inputs, outputs) in enumerate(points):
        x = f"x{inputs}"
        feeds.setdefault(x, rng.standard_normal((layer.batch, inputs, *layer.spatial), np.float32))
        made, stored = _layer(layer, i, x, inputs, outputs)
        nodes += made
        weights += stored
        last.append(f"layer{i}")
    axes = list(range(1 if layer.spatial else 0, 2 + len(layer.spatial)))
    shrunk = []
    for name in last:
        # A pooling keeps the blocked layout of a convolution; the mean of a matrix is small.
        op = "GlobalAveragePool" if layer.spatial else "ReduceMean"
        nodes.append(helper.make_node(op, [name], [f"pool.{name}"]))
        nodes.append(helper.make_node("ReduceMean", [f"pool.{name}"], [f"mean.{name}"], axes=axes, keepdims=0))
        shrunk.append(f"mean.{name}")
    nodes.append(helper.make_node("Sum", shrunk, ["sum"]))
    return _model(nodes, {k: list(v.shape) for k, v in feeds.items()}, {"sum": None}, weights), feeds


def _layer(
    layer: Layer, i: int, x: str, inputs: int, outputs: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    name = f"layer{i}"
    if layer.op == "Add":
        return [helper.make_node("Add", [x, x], [name], name=name)], []
    rng = np.random.default_rng(i)
    group = layer.groups(outputs)
    if layer.op == "Gemm":
        shape: tuple[int, ...] = (inputs, outputs)
    elif layer.op == "Conv":
        shape = (outputs, inputs // group, *layer.kernel)
    else:
        shape = (inputs, outputs // group, *layer.kernel)
    weight = rng.standard_normal(shape, np.float32) * np.float32(0.01)
    bias = rng.standard_normal(outputs, np.float32)
    stored = [numpy_helper.from_array(weight, f"w{i}"), numpy_helper.from_array(bias, f"b{i}")]
    attributes = dict(layer.window) | ({"group": group} if group > 1 else {})
    node = helper.make_node(layer.op, [x, f"w{i}", f"b{i}"], [name], name=name, **attributes)
    return [node], stored


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int]],
    outputs: Mapping[str, Sequence[int] | None],
    weights: Sequence[onnx.TensorProto],
) -> onnx.ModelProto:
    def infos(values: Mapping[str, Sequence[int] | None]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]

    graph = helper.make_graph(nodes, "layer", infos(inputs), infos(outputs), weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", OPSET)])


class TableStore:
    """Measured tables of one provider on one machine, in a file of a folder.

    Args:
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        threads: of the CPU provider.
        folder: ``None`` is the user's cache folder.
    """

    def __init__(self, provider: str, threads: int | None, folder: Path | None = None) -> None:
        self.machine = machine(provider, threads)
        digest = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / f"latency-{provider}-{digest}.json"

    def load(self) -> dict[str, dict[Point, float]]:
        """Return the times by the layers' keys; nothing when there is no file that this version understands."""
        try:
            raw = json.loads(self.path.read_text())
            if raw["schema_version"] != SCHEMA_VERSION or raw["machine"] != self.machine:
                return {}
            layers = {key: {(i, o): float(s) for i, o, s in rows} for key, rows in raw["layers"].items()}
            return {key: times for key, times in layers.items() if all(0 < s < np.inf for s in times.values())}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def save(self, layers: Mapping[str, Mapping[Point, float]]) -> None:
        """Write the times.

        Raises:
            OutputError: the file cannot be written.
        """
        rows = {key: [[*point, float(f"{s:.6g}")] for point, s in times.items()] for key, times in layers.items()}
        head = {"schema_version": SCHEMA_VERSION, "kind": "prune-onnx latency tables", "machine": self.machine}
        write_text(self.path, json.dumps({**head, "layers": rows}, indent=0) + "\n")


def machine(provider: str, threads: int | None) -> dict[str, Any]:
    """Return what the time of a layer depends on beside the layer."""
    facts = capture()
    versions = {name: v for name, v in facts["versions"].items() if name.startswith("onnxruntime")}
    return {
        "provider": provider,
        "cpu": facts["cpu"],
        "cores": facts["cores"],
        "gpus": _gpus() if provider != "cpu" else [],
        "runtime": versions,
        "threads": threads,
    }


def _gpus() -> list[str]:
    """Names of the GPUs, as the driver tells them."""
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = path.read_text().splitlines()
        found += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return found


def cache_folder() -> Path:
    """Return the folder where a user's programs keep what can be made again."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "prune-onnx"


def tables(layers: Iterable[Layer], store: TableStore, timer: Timer, progress: Progress) -> dict[str, Table]:
    """Return the table of every layer; what the store lacks is measured and stored.

    Args:
        layers: repetitions are measured once.
        store: where earlier measurements lie.
        timer: measures the others.
        progress: told of every layer.
    """
    wanted = {layer.key: layer for layer in layers}
    known = store.load()
    missing = {k: layer for k, layer in wanted.items() if not set(layer.points) <= known.get(k, {}).keys()}
    if missing:
        progress.note(f"timing {len(missing)} layer shapes, once for this machine; kept in {store.path}")
        measured: dict[str, dict[Point, float]] = {}
        with progress.task("timing layers", PASSES * len(missing)) as advance:
            for _ in range(PASSES):
                for key, layer in missing.items():
                    times = dict(zip(layer.points, timer.times(layer, layer.points), strict=True))
                    earlier = measured.get(key, times)
                    measured[key] = {point: min(times[point], earlier[point]) for point in times}
                    advance(1)
        known |= measured
        try:
            store.save(known)
        except OutputError as error:
            progress.warn(f"the times of the layers are not kept: {error}")
    return {key: Table(layer, known[key]) for key, layer in wanted.items()}
