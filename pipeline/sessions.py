"""ONNX Runtime sessions on the provider that was asked for, or an error that says what is missing.

ONNX Runtime answers a provider that it cannot load with a warning and the CPU. A figure measured that way is
wrong without looking wrong, so here every such fall-back, of the session or of single nodes, is an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from prune_onnx.graph_ops.errors import ConfigError, ModelError, ProviderError
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.registry import close_matches

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

# Every error that matters is raised as an exception as well; logged, it would only be said twice (and in colour).
_LOG_FATAL = 4

_SOURCE = re.compile(r"^\S+\.(?:cc|h|cpp|cu):\d+ .*?\) (?=[A-Z])", re.DOTALL)
_ERROR_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
_UNKNOWN_OP = (
    re.compile(r"(?P<domain>[\w.]*):(?P<op>\w+)\(-?\d+\) is not a registered function/op"),
    re.compile(r"No Op registered for (?P<op>\w+) with domain_version of (?P<version>\d+)"),
)


def create_session(
    model: str | Path | bytes | onnx.ModelProto,
    provider: str = "cpu",
    *,
    threads: int | None = None,
    optimize: bool = True,
    arena: bool = True,
    config: Mapping[str, str] | None = None,
    provider_options: Mapping[str, Any] | None = None,
    profile: str | Path | None = None,
) -> InferenceSession:
    """Open a model in ONNX Runtime on one provider, without any fall-back.

    Args:
        model: an ONNX file (external data is found beside it), its bytes, or a model in memory.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        threads: of one operator on the CPU; ``None`` is ONNX Runtime's choice, one a physical core.
        optimize: all graph optimisations, or none.
        arena: whether memory is kept for reuse; off, a run gives it back, which is slower and smaller.
        config: ONNX Runtime session configuration entries, such as ``session.force_spinning_stop``.
        provider_options: options of the provider, by ONNX Runtime's names.
        profile: where the time of every node is written (a prefix of the file's name), when the session ends it.

    Raises:
        ConfigError: the provider's name is unknown or ``threads`` is less than one.
        ProviderError: the provider is not built in, its libraries or device are missing, or it left nodes to the CPU.
        ModelError: the model is missing, truncated, not ONNX, invalid, or has an operator that is not known here.
    """
    label, source = _source(model)
    name = provider_name(provider)
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads}: give 1 or more.")
    ort = open_runtime()
    if name not in ort.get_available_providers():
        raise ProviderError(
            f"{provider} was asked for, but this onnxruntime {ort.__version__} is built without {name} "
            f"(it has: {', '.join(ort.get_available_providers())}). {_remedy(provider)}"
        )
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = arena
    if not arena:  # nodes run in an order in which sizes are asked early and what is read for the last time can go
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    entries = dict(config or {})
    if provider != "cpu":
        _preload_cuda()
        # The older way also refuses shape arithmetic on the CPU, so it is only for versions without the newer one.
        entry = "record_ep_graph_assignment_info" if _reports_placement(ort) else "disable_cpu_ep_fallback"
        entries[f"session.{entry}"] = "1"
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    try:
        session = ort.InferenceSession(
            source, options, providers=[(name, dict(provider_options or {}))], enable_fallback=0
        )
    except Exception as error:  # onnxruntime's exceptions share no base class
        if provider != "cpu":
            create_session(model, "cpu", threads=threads, optimize=optimize)  # a model's fault fails here as well
            raise ProviderError(_not_available(ort, provider, one_line(error))) from error
        raise ModelError(_model_failure(label, error)) from error
    if session.get_providers()[0] != name:
        raise ProviderError(_not_available(ort, provider))
    _check_placement(session, provider, source)
    return session


def provider_name(provider: str) -> str:
    """Return ONNX Runtime's name of a provider.

    Raises:
        ConfigError: the name is unknown.
    """
    if provider not in PROVIDERS:
        known = list(PROVIDERS)
        raise ConfigError(f"unknown provider {provider!r}.{close_matches(provider, known)} Known: {', '.join(known)}.")
    return PROVIDERS[provider]


def one_line(error: object) -> str:
    """Return the first line of an ONNX Runtime error, without its error code, source position and final stop."""
    text = _SOURCE.sub("", _ERROR_CODE.sub("", str(error).strip()))
    return (text.splitlines() or [type(error).__name__])[0].strip().rstrip(".")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output as the model declares it; ``None`` stands for a size that the file leaves open."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join('?' if d is None else str(d) for d in self.shape)}]"


def input_specs(session: InferenceSession) -> list[TensorSpec]:
    """Return the session's inputs.

    Raises:
        ModelError: an input is not a tensor of numbers.
    """
    return [_spec(value) for value in session.get_inputs()]


def output_specs(session: InferenceSession) -> list[TensorSpec]:
    """Return the session's outputs.

    Raises:
        ModelError: an output is not a tensor of numbers.
    """
    return [_spec(value) for value in session.get_outputs()]


def check_same_interface(model: InferenceSession, baseline: InferenceSession) -> None:
    """Refuse two models that cannot take the same inputs or whose outputs cannot be compared.

    Sizes that one of the two leaves open fit any size of the other.

    Raises:
        ModelError: names, types or sizes differ; the message shows the first difference.
    """
    for kind, specs in (("inputs", input_specs), ("outputs", output_specs)):
        mine, theirs = specs(model), specs(baseline)
        fits = len(mine) == len(theirs) and all(_compatible(a, b) for a, b in zip(mine, theirs, strict=True))
        if not fits:
            raise ModelError(
                f"model and baseline cannot be compared: the model's {kind} are {_listed(mine)}, "
                f"the baseline's {_listed(theirs)}."
            )


def run_session(session: InferenceSession, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a session and return all outputs.

    Raises:
        ModelError: the inputs do not fit or the run fails.
    """
    try:
        return session.run(None, dict(feed))
    except Exception as error:  # onnxruntime's exceptions share no base class
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feed.items())
        raise ModelError(f"the model fails on input {shapes}: {one_line(error)}.") from error


@functools.cache
def open_runtime() -> ModuleType:
    """Import onnxruntime, which is slow, and keep its global logger quiet (a missing provider is logged there).

    Raises:
        ProviderError: it is not installed, or cannot be loaded.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ProviderError(f"onnxruntime cannot be imported ({error}). Install onnxruntime-gpu.") from None
    onnxruntime.set_default_logger_severity(_LOG_FATAL)
    return onnxruntime


@functools.cache
def _preload_cuda() -> None:
    """Load the CUDA libraries of torch's and NVIDIA's pip packages, where onnxruntime does not look by itself."""
    preload = getattr(open_runtime(), "preload_dlls", None)
    if preload is None:
        return
    # NVIDIA's packages, which torch for Linux depends on; then what a build of torch brings in its own folder.
    for folder in (None, *_torch_libraries()):
        # What it cannot find it prints; the session's failure is diagnosed in one place, below.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            preload(directory=folder)


def _torch_libraries() -> list[str]:
    """Return torch's folder of libraries if it holds CUDA's; torch itself, which is slow, is not imported."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(place) / "lib" for place in (spec.submodule_search_locations if spec else None) or ()]
    return [str(folder) for folder in folders if any(folder.glob("*cudart*")) or any(folder.glob("*cudnn*"))]


def _source(model: str | Path | bytes | onnx.ModelProto) -> tuple[str, str | bytes]:
    if isinstance(model, onnx.ModelProto):
        try:
            return "the model", model.SerializeToString()
        except ValueError as error:
            raise ModelError("the model is larger than 2 GB; save it with external data and give the file.") from error
    if isinstance(model, bytes):
        return "the model", model
    if not os.path.exists(model):
        raise ModelError(f"{model} does not exist.")
    if not os.path.isfile(model):
        raise ModelError(f"{model} is not a file.")
    if not os.access(model, os.R_OK):
        raise ModelError(f"{model} cannot be read: no permission.")
    return str(model), str(model)


def _model_failure(label: str, error: Exception) -> str:
    text = one_line(error)
    if type(error).__name__ == "InvalidProtobuf" or "No graph was found" in text:
        return f"{label} is truncated or not an ONNX model."
    for pattern in _UNKNOWN_OP:
        if found := pattern.search(str(error)):
            op, domain = found["op"], found.groupdict().get("domain")
            if domain:
                return f"{label} uses {op!r} of the custom domain {domain!r}, which ONNX Runtime does not know."
            opset = f" in opset {found['version']}" if "version" in found.groupdict() else ""
            return f"{label} uses operator {op!r}, which ONNX Runtime does not know{opset}."
    return f"{label} cannot be opened by ONNX Runtime: {text}."


def _reports_placement(ort: ModuleType) -> bool:
    return hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")


def _check_placement(session: InferenceSession, provider: str, source: str | bytes) -> None:
    """Raise when nodes were placed on another provider, as far as this onnxruntime tells.

    Arithmetic on shapes may stay behind: CUDA leaves it on the CPU on purpose, where its few integers live.
    """
    if provider == "cpu" or not _reports_placement(open_runtime()):
        return
    name = PROVIDERS[provider]
    strays = [
        (node, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != name
        for node in part.get_nodes()
    ]
    if strays:
        on_shapes = _shape_arithmetic(source)
        strays = [(node, ep) for node, ep in strays if (node.name, node.op_type) not in on_shapes]
    if strays:
        shown = ", ".join(f"{node.name or 'unnamed'} ({node.op_type}) on {ep}" for node, ep in strays[:5])
        more = f" and {len(strays) - 5} more" if len(strays) > 5 else ""
        raise ProviderError(f"{provider} was asked for, but {name} does not run every node: {shown}{more}.")


def _shape_arithmetic(source: str | bytes) -> set[tuple[str, str]]:
    """Return (name, op_type) of the nodes that no input's values reach, only its size."""
    model = onnx.load(source, load_external_data=False) if isinstance(source, str) else onnx.load_from_string(source)
    graph = Graph(model)
    nodes = {(node.proto.name, node.op_type) for node in graph.nodes}
    return nodes - {
        (node.proto.name, node.op_type)
        for node in graph.nodes
        if any(output and not graph.is_static(output) for output in node.outputs)
    }


def _not_available(ort: ModuleType, provider: str, reason: str = "") -> str:
    """Say why a provider that is built in does not work here: the missing library, or else ``reason``."""
    kind = ".dll" if sys.platform == "win32" else ".so"
    prefix = "" if sys.platform == "win32" else "lib"
    library = Path(ort.__file__).parent / "capi" / f"{prefix}onnxruntime_providers_{provider}{kind}"
    missing = ""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        missing = str(error).split(":")[0]
    if missing:
        return f"{provider} was asked for, but {missing} cannot be loaded. {_remedy(provider)}"
    why = reason or "no device or driver answers (see nvidia-smi)"
    return f"{provider} was asked for, but it does not start: {why}. {_remedy(provider)}"


def _remedy(provider: str) -> str:
    if provider == "tensorrt":
        install = "Install onnxruntime-gpu and the TensorRT release that it was built for"
    else:
        install = 'Install the driver and pip install "onnxruntime-gpu[cuda,cudnn]"'
    return f"{install}, or choose --provider cpu."


def _spec(value: Any) -> TensorSpec:
    types = {"float": "float32", "double": "float64"}
    inner = value.type.removeprefix("tensor(").removesuffix(")")
    try:
        if not value.type.startswith("tensor("):
            raise TypeError
        dtype = np.dtype(types.get(inner, inner))
    except TypeError:
        raise ModelError(f"{value.name!r} is of type {value.type}; only tensors of numbers are supported.") from None
    return TensorSpec(value.name, tuple(d if isinstance(d, int) else None for d in value.shape), dtype)


def _compatible(a: TensorSpec, b: TensorSpec) -> bool:
    sizes = len(a.shape) == len(b.shape) and all(
        x == y or None in (x, y) for x, y in zip(a.shape, b.shape, strict=True)
    )
    return a.name == b.name and a.dtype == b.dtype and sizes


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, specs)) or "none"
