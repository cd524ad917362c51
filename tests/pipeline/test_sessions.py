"""Sessions: the provider that was asked for or an error, and one line for whatever is wrong with a file."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from prune_onnx.graph_ops.errors import ConfigError, ModelError, ProviderError, PruneOnnxError
from prune_onnx.pipeline import sessions
from prune_onnx.pipeline.sessions import (
    check_same_interface,
    create_session,
    input_specs,
    one_line,
    output_specs,
    run_session,
)

RELU = '<ir_version: 9, opset_import: ["" : 17]> g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }'
# The batch size is read off the input; all but Relu and the unnamed Reshape is arithmetic on shapes.
SHAPED = """<ir_version: 9, opset_import: ["" : 17]>
g (float[N, 3] x) => (float[M] y) <int64 zero = {0}, int64 three = {3}, int64[1] axes = {0}> {
  [sizes] s = Shape(x)
  [pick] n = Gather(s, zero)
  [times] m = Mul(n, three)
  [wide] e = Unsqueeze(m, axes)
  [act] r = Relu(x)
  y = Reshape(r, e)
}"""


@pytest.mark.parametrize("form", ["path", "bytes", "proto"])
def test_a_model_runs_from_every_form(form: str, tmp_path: Path) -> None:
    model = parser.parse_model(RELU)
    path = tmp_path / "relu.onnx"
    onnx.save(model, path)
    source = {"path": path, "bytes": path.read_bytes(), "proto": model}[form]
    x = np.array([[-1, 0, 2]], np.float32)
    (y,) = run_session(create_session(source, threads=1), {"x": x})
    np.testing.assert_array_equal(y, np.maximum(x, 0))


def damaged(name: str) -> bytes:
    whole = parser.parse_model(RELU).SerializeToString()
    return {"truncated": whole[: len(whole) // 2], "text": b"this is no model at all " * 9, "empty": b""}[name]


@pytest.mark.parametrize("name", ["truncated", "text", "empty"])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_a_damaged_file_is_the_models_fault_on_any_provider(name: str, provider: str, tmp_path: Path) -> None:
    if sessions.PROVIDERS[provider] not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime is built without {provider}")
    path = tmp_path / f"{name}.onnx"
    path.write_bytes(damaged(name))
    with pytest.raises(ModelError, match=rf"{name}\.onnx is truncated or not an ONNX model\.$"):
        create_session(path, provider)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.onnx does not exist"):
        create_session(tmp_path / "nothing.onnx")
    with pytest.raises(ModelError, match="is not a file"):
        create_session(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (RELU.replace('"" : 17', '"" : 17, "com.acme" : 1').replace("Relu", "com.acme.Foo"), ["'Foo'", "'com.acme'"]),
        (RELU.replace("Relu", "Foo"), ["'Foo'", "opset 17"]),
        (RELU.replace("Relu(x)", "Relu(z)"), ["'z'"]),
    ],
    ids=["custom-domain", "unknown-operator", "dangling-input"],
)
def test_what_onnxruntime_cannot_run_is_named_in_one_line(
    text: str, says: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        create_session(parser.parse_model(text))
    message = str(caught.value)
    assert "\n" not in message
    assert "onnxruntime_src" not in message
    assert all(part in message for part in says), message
    assert capfd.readouterr() == ("", "")


def test_wrong_options_are_config_errors() -> None:
    model = parser.parse_model(RELU)
    with pytest.raises(ConfigError, match=r"unknown provider 'cudda'. Did you mean 'cuda' or 'cpu'\?"):
        create_session(model, "cudda")
    with pytest.raises(ConfigError, match="--threads 0"):
        create_session(model, threads=0)


def test_an_input_that_does_not_fit_is_a_model_error() -> None:
    session = create_session(parser.parse_model(RELU))
    with pytest.raises(ModelError, match=r"x float32\[1, 4\]"):
        run_session(session, {"x": np.zeros((1, 4), np.float32)})


def test_messages_lose_code_and_source_position() -> None:
    position = "/onnxruntime_src/onnxruntime/core/a.h:46 void f(const b&, int) "
    assert one_line(f"[ONNXRuntimeError] : 1 : FAIL : {position}Opset 99 is new.\n") == "Opset 99 is new"
    assert one_line("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : No graph.") == "No graph"


def test_specs_tell_open_sizes() -> None:
    session = create_session(parser.parse_model(RELU.replace("float[N, 3] x", "float16[N, 3] x").replace(
        "Relu(x)", "Cast<to = 1>(x)")))  # fmt: skip
    (spec,) = input_specs(session)
    assert (spec.name, spec.shape, spec.dtype) == ("x", (None, 3), np.float16)
    assert str(output_specs(session)[0]) == "y float32[?, 3]"


def test_interfaces_that_differ_are_refused_with_both_sides_shown() -> None:
    model = create_session(parser.parse_model(RELU))
    check_same_interface(model, create_session(parser.parse_model(RELU.replace("[N, 3]", "[1, 3]"))))
    for change in (("x", "input"), ("[N, 3]", "[N, 4]"), ("float", "double")):
        other = create_session(parser.parse_model(RELU.replace(*change)))
        with pytest.raises(ModelError, match=r"cannot be compared.*the baseline's"):
            check_same_interface(model, other)


# What follows stands in for an onnxruntime with a GPU.


def node(name: str, op_type: str) -> Any:
    return types.SimpleNamespace(name=name, op_type=op_type, domain="")


def runtime(placed: dict[str, list[Any]] | None, *, providers: list[str], available: list[str] | None = None) -> Any:
    """An onnxruntime that says it placed nodes so; ``placed=None`` is one that does not tell."""

    class Session:
        def __init__(self, source: Any, options: Any, **rest: Any) -> None:
            self.source, self.options = source, options

        def get_providers(self) -> list[str]:
            return providers

    if placed is not None:
        parts = [types.SimpleNamespace(ep_name=ep, get_nodes=lambda nodes=nodes: nodes) for ep, nodes in placed.items()]
        Session.get_provider_graph_assignment_info = lambda self: parts  # type: ignore[attr-defined]
    return types.SimpleNamespace(
        __version__="1.0",
        __file__=onnxruntime.__file__,
        InferenceSession=Session,
        SessionOptions=onnxruntime.SessionOptions,
        GraphOptimizationLevel=onnxruntime.GraphOptimizationLevel,
        get_available_providers=lambda: available or ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(fake: Any) -> None:
        monkeypatch.setattr(sessions, "open_runtime", lambda: fake)
        monkeypatch.setattr(sessions, "_preload_cuda", lambda: None)

    return install


GPU = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_a_provider_that_is_not_built_in_is_an_error_with_the_list(use: Any) -> None:
    use(runtime({}, providers=GPU, available=["CPUExecutionProvider"]))
    with pytest.raises(ProviderError, match=r"built without CUDAExecutionProvider \(it has: CPUExecutionProvider\)"):
        create_session(parser.parse_model(RELU), "cuda")


def test_a_session_that_fell_back_is_an_error(use: Any) -> None:
    use(runtime({}, providers=["CPUExecutionProvider"]))
    with pytest.raises(ProviderError, match=r"cuda was asked for, but .*--provider cpu"):
        create_session(parser.parse_model(RELU), "cuda")


def test_nodes_on_another_provider_are_named(use: Any) -> None:
    strays = [node(f"conv{i}", "Conv") for i in range(7)]
    use(runtime({GPU[0]: [node("a", "Relu")], GPU[1]: strays}, providers=GPU))
    with pytest.raises(ProviderError, match=r"conv0 \(Conv\) on CPUExecutionProvider.*and 2 more"):
        create_session(parser.parse_model(RELU), "cuda")


def test_arithmetic_on_shapes_may_stay_on_the_cpu(use: Any) -> None:
    model = parser.parse_model(SHAPED)
    shapes = [node("sizes", "Shape"), node("pick", "Gather"), node("times", "Mul"), node("wide", "Unsqueeze")]
    use(runtime({GPU[0]: [node("act", "Relu"), node("", "Reshape")], GPU[1]: shapes}, providers=GPU))
    create_session(model, "cuda")
    use(runtime({GPU[1]: [*shapes, node("act", "Relu")]}, providers=GPU))
    with pytest.raises(ProviderError, match=r"every node: act \(Relu\) on CPUExecutionProvider\.$"):
        create_session(model, "cuda")


def test_an_onnxruntime_that_does_not_tell_placement_is_forbidden_to_fall_back(use: Any) -> None:
    use(runtime(None, providers=GPU))
    session: Any = create_session(parser.parse_model(RELU), "cuda")
    assert session.options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_cuda_is_preloaded_from_nvidias_packages_and_from_torchs_own_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str | None] = []

    def preload(directory: str | None = None) -> None:
        asked.append(directory)
        print("Failed to load libcudnn.so.9")
        raise OSError("not there either")

    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "torch")])
    monkeypatch.setattr(sessions.importlib.util, "find_spec", lambda name: spec if name == "torch" else None)
    monkeypatch.setattr(sessions, "open_runtime", lambda: types.SimpleNamespace(preload_dlls=preload))
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    sessions._preload_cuda.__wrapped__()
    assert asked == [None]
    (tmp_path / "torch" / "lib" / "libcudnn.so.9").touch()
    sessions._preload_cuda.__wrapped__()
    assert asked == [None, None, str(tmp_path / "torch" / "lib")]
    assert capsys.readouterr().out == ""
    # Versions that cannot preload, and machines without torch, are none of this function's business.
    monkeypatch.setattr(sessions, "open_runtime", types.SimpleNamespace)
    sessions._preload_cuda.__wrapped__()
    monkeypatch.setattr(sessions.importlib.util, "find_spec", lambda name: None)
    assert sessions._torch_libraries() == []


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_missing_gpu_libraries_are_named_and_nothing_is_printed(
    provider: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name = sessions.PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime is built without {name}")
    try:
        create_session(parser.parse_model(RELU), provider)
    except PruneOnnxError as error:
        caught = error
    else:
        pytest.skip(f"{provider} works on this machine")
    assert type(caught) is ProviderError
    assert str(caught).startswith(f"{provider} was asked for, but ")
    assert str(caught).endswith("or choose --provider cpu.")
    assert "\n" not in str(caught)
    assert capfd.readouterr() == ("", "")
