"""Where and how a model runs: the provider's options, and the function that runs it once.

On the CPU a run is ``session.run`` from host memory to host memory. On a GPU inputs and outputs lie in buffers of the
device, so that copies are not part of a run (they are timed apart), and the clock stops when the device has finished.
Small nets spend their time on launching kernels, which a CUDA graph does once for all of them.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.errors import ConfigError, OutputError, ProviderError

from .sessions import create_session, one_line

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, OrtValue

    from .eval_schema import Layout, Provider, Search

Source = Path | bytes | onnx.ModelProto

# Copies that are timed, and those before them that only touch the buffers for the first time.
COPIES, FIRST_COPIES = 20, 3
# Operators whose body the host chooses while the model runs.
CONTROL_FLOW = ("If", "Loop", "Scan")
# Idle threads spin for some 40 ms by default, which the next model's block has to wait out. Spinning for less costs a
# run only where some of its threads have nothing to do for longer than this, and then no more than their waking up, 20
# to 50 microseconds. Versions of ONNX Runtime that do not know the entry spin as long as ever.
SPIN, SPIN_MICROSECONDS = "session.intra_op.spin_duration_us", "10000"
# Of the run that finds out the outputs' sizes: it is not recorded as a CUDA graph.
NOT_RECORDED = ("gpu_graph_id", "-1")
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Execution:
    """Where and how a model runs.

    Attributes:
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        threads: of the CPU provider; ``None`` is ONNX Runtime's choice, one a physical core.
        cores: processors to which the threads are bound, one each, the calling thread's first (see :func:`pinned`);
            empty leaves them to the system.
        cuda_layout: in which the CUDA provider keeps images; ``nhwc`` saves the tensor cores a conversion.
        tf32: whether the CUDA provider may round the factors of float32 products to TF32 (10 bits of mantissa).
        conv_search: how the CUDA provider chooses a convolution's algorithm, in the first run of every shape.
        cuda_graph: record a run's kernels once and launch them together.
        fp16: whether TensorRT may compute in float16.
        engine_cache: folder in which TensorRT keeps the engines that it built; ``None`` keeps none.
    """

    provider: Provider = "cpu"
    threads: int | None = None
    cores: tuple[int, ...] = ()
    cuda_layout: Layout = "nchw"
    tf32: bool = True
    conv_search: Search = "exhaustive"
    cuda_graph: bool = False
    fp16: bool = False
    engine_cache: Path | None = None

    def session(
        self, model: Source, feed: Mapping[str, np.ndarray] | None = None, profile: Path | None = None
    ) -> InferenceSession:
        """Open a model, for one shape of inputs where ``feed`` is given, and with a profile where that is wanted.

        Raises:
            ConfigError, ModelError, ProviderError: see :func:`.sessions.create_session`.
            OutputError: the engine cache cannot be made.
        """
        return create_session(
            model,
            self.provider,
            threads=self.thread_count,
            config=self.entries,
            provider_options=self.provider_options(model, feed),
            profile=profile,
        )

    def runner(self, model: Source, feed: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """Return a function that runs the model once on ``feed`` and returns the seconds it took.

        Raises:
            ConfigError, ModelError, ProviderError, OutputError: see :meth:`session`; also when a first run fails.
        """
        session = self.session(model, feed)
        return host_runner(session, feed) if self.provider == "cpu" else device_runner(session, feed)

    @property
    def thread_count(self) -> int | None:
        """Threads of the session, ``None`` where ONNX Runtime chooses."""
        return len(self.cores) or self.threads

    @property
    def entries(self) -> dict[str, str]:
        """Entries of the session's configuration."""
        entries = {SPIN: SPIN_MICROSECONDS} if self.provider == "cpu" else {}
        # ONNX Runtime counts processors from 1; the calling thread is the first of the pool, and not its to bind.
        workers = ";".join(str(core + 1) for core in self.cores[1:])
        return entries | ({"session.intra_op_thread_affinities": workers} if workers else {})

    def provider_options(self, model: Source, feed: Mapping[str, np.ndarray] | None = None) -> dict[str, str]:
        """Return the provider's options by ONNX Runtime's names.

        Raises:
            OutputError: the engine cache cannot be made.
        """
        if self.provider == "cuda":
            return {
                "cudnn_conv_algo_search": self.conv_search.upper(),
                "cudnn_conv_use_max_workspace": "1",
                "prefer_nhwc": str(int(self.cuda_layout == "nhwc")),
                "use_tf32": str(int(self.tf32)),
                "enable_cuda_graph": str(int(self.cuda_graph)),
            }
        if self.provider == "tensorrt":
            options = {"trt_fp16_enable": str(self.fp16), "trt_cuda_graph_enable": str(self.cuda_graph)}
            if self.engine_cache is not None and isinstance(model, Path):
                folder = str(engine_folder(self.engine_cache, model, feed))
                options |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": folder}
                options |= {"trt_timing_cache_enable": "True", "trt_timing_cache_path": folder}
            return options
        return {}


def host_runner(session: InferenceSession, feed: Mapping[str, np.ndarray]) -> Callable[[], float]:
    """Return a runner from host memory to host memory: inputs are arrays, and outputs are made anew by every run."""
    inputs = dict(feed)
    clock = time.perf_counter

    def run() -> float:
        start = clock()
        session.run(None, inputs)
        return clock() - start

    return run


def device_runner(
    session: InferenceSession, feed: Mapping[str, np.ndarray], device: str = "cuda"
) -> Callable[[], float]:
    """Return a runner whose inputs and outputs stay in the same buffers of ``device``.

    Raises:
        ProviderError: the first run fails.
    """
    binding, _, _ = _bound(session, feed, device)
    clock = time.perf_counter

    def run() -> float:
        start = clock()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return clock() - start

    return run


@dataclass(frozen=True)
class CopyTimes:
    """Medians in ms: all inputs from host memory to the device, all outputs back."""

    to_device: float
    to_host: float


def copy_times(session: InferenceSession, feed: Mapping[str, np.ndarray], device: str = "cuda") -> CopyTimes:
    """Time the copies that :func:`device_runner` leaves out.

    Raises:
        ProviderError: the run that makes the outputs fails.
    """
    _, inputs, outputs = _bound(session, feed, device)

    def there() -> None:
        for name, value in inputs.items():
            value.update_inplace(np.ascontiguousarray(feed[name]))

    def back() -> None:
        for value in outputs:
            value.numpy()

    return CopyTimes(_median_ms(there), _median_ms(back))


def pinned_cores(threads: int | None) -> tuple[int, ...]:
    """Return a processor for each thread, those that share no core with another one first.

    Args:
        threads: how many; ``None`` is one a physical core.

    Raises:
        ConfigError: this system cannot bind threads, or this process has fewer processors than threads.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("--pin: this system cannot bind threads to processors; Linux can.")
    seen: set[str] = set()
    first, second = [], []
    for core in sorted(os.sched_getaffinity(0)):
        try:
            siblings = (_CPUS / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
        except OSError:
            siblings = str(core)
        (second if siblings in seen else first).append(core)
        seen.add(siblings)
    wanted, cores = threads or len(first), first + second
    if wanted > len(cores):
        raise ConfigError(f"--pin: {wanted} threads, but only {len(cores)} processors for this process.")
    return tuple(cores[:wanted])


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Bind the calling thread to the first of ``cores`` while the block runs; without any, do nothing.

    Threads that are made meanwhile are bound to it too, unless they are bound otherwise as a session's are.
    """
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def check_recordable(label: str, model: onnx.ModelProto) -> None:
    """Refuse what no CUDA graph can record: control flow, which the host decides in the middle of a run.

    Raises:
        ConfigError: names the nodes.
    """
    found = [f"{node.name or 'unnamed'} ({node.op_type})" for node in model.graph.node if node.op_type in CONTROL_FLOW]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ConfigError(f"--cuda-graph: {label} has control flow, which cannot be recorded: "
                          f"{', '.join(found[:3])}{more}. Leave the option out.")  # fmt: skip


def default_engine_cache() -> Path:
    """Return the folder of built engines in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prune-onnx" / "tensorrt"


def tf32_allowed(execution: Execution) -> bool:
    """Whether float32 products may be rounded to TF32, on a GPU that has it.

    TensorRT allows it unless NVIDIA's own variable forbids it to all libraries.
    """
    return execution.tf32 and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"


def weight_type(model: onnx.ModelProto) -> str:
    """Return the type in which most of a model's numbers are stored, of its inputs if it has no weights."""
    sizes: Counter[int] = Counter()
    for tensor in model.graph.initializer:
        sizes[tensor.data_type] += math.prod(tensor.dims)
    for value in [] if sizes else model.graph.input:
        sizes[value.type.tensor_type.elem_type] += 1
    return onnx.TensorProto.DataType.Name(sizes.most_common(1)[0][0]).lower() if sizes else "unknown"


def engine_folder(cache: Path, model: Path, feed: Mapping[str, np.ndarray] | None) -> Path:
    """Return the folder of one model's engines for one shape of inputs, made if it is not there.

    ONNX Runtime names an engine by the model's file name and node names, not by its weights, so two models of one
    name would take each other's engine; and an engine that has seen two shapes is built for all between them.

    Raises:
        OutputError: it cannot be made.
    """
    digest = hashlib.sha256()
    for part in (model, *sorted(model_io.data_files(model))):
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    shapes = ["x".join(map(str, array.shape)) for _, array in sorted((feed or {}).items())]
    folder = cache / "-".join([digest.hexdigest()[:16], *shapes])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}. Give another --engine-cache.") from error
    return folder


def _bound(
    session: InferenceSession, feed: Mapping[str, np.ndarray], device: str
) -> tuple[IOBinding, dict[str, OrtValue], list[OrtValue]]:
    """Bind inputs and outputs to buffers of ``device`` that stay where they are, as a CUDA graph needs them.

    The outputs' sizes are known after a run, which makes the buffers.
    """
    from onnxruntime import OrtValue, RunOptions

    binding = session.io_binding()
    inputs = {name: OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in feed.items()}
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    names = [output.name for output in session.get_outputs()]
    for name in names:
        binding.bind_output(name, device, 0)
    binding.synchronize_inputs()
    options = RunOptions()
    options.add_run_config_entry(*NOT_RECORDED)
    try:
        session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ProviderError(f"{session.get_providers()[0]} fails to run the model: {one_line(error)}.") from error
    outputs = list(binding.get_outputs())
    for name, value in zip(names, outputs, strict=True):
        binding.bind_ortvalue_output(name, value)
    return binding, inputs, outputs


def _median_ms(copy: Callable[[], Any]) -> float:
    times = []
    for _ in range(FIRST_COPIES + COPIES):
        start = time.perf_counter()
        copy()
        times.append(time.perf_counter() - start)
    return float(np.median(times[FIRST_COPIES:])) * 1e3
