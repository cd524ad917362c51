"""Files: what cannot be read says why, what is read is complete, what is written appears complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.errors import ModelError, OutputError
from prune_onnx.graph_ops.graph import Graph, tensor_value

from .builder import Net, distance, outputs_of


def small_model(channels: int = 24) -> onnx.ModelProto:
    """Two convolutions; their weights are large enough to stay in the file."""
    net = Net()
    y = net.relu(net.conv(net.input(1, 3, 8, 8), channels, name="first"))
    return net.model(net.head(net.conv(y, channels, name="second")))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "model.onnx"
    onnx.save(small_model(), target)
    return target


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: tensor_value(t) for t in model.graph.initializer}


def assert_same(a: onnx.ModelProto, b: onnx.ModelProto) -> None:
    """The same message, wherever the weights lie."""
    assert model_io.with_weights(a).SerializeToString(deterministic=True) == model_io.with_weights(b).SerializeToString(
        deterministic=True
    )


# -- reading ---------------------------------------------------------------------------------------
def test_a_file_is_read_completely(path: Path) -> None:
    model = model_io.load(path)
    assert_same(model, onnx.load(path))
    assert any(t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer), (
        "its bulk should stay in the file"
    )


def test_a_model_in_memory_is_copied(path: Path) -> None:
    source = onnx.load(path)
    before = source.SerializeToString()
    model = model_io.load(source)
    model.graph.node[0].name = "changed"
    assert source.SerializeToString() == before


def test_a_graphsurgeon_graph_is_taken(path: Path) -> None:
    model = model_io.load(gs.import_onnx(onnx.load(path)))
    assert [n.op_type for n in model.graph.node] == [n.op_type for n in onnx.load(path).graph.node]
    want, got = weights(onnx.load(path)), weights(model)
    for name in want:
        np.testing.assert_array_equal(want[name], got[name])


def test_other_objects_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot read a model from dict; give a path, a ModelProto"):
        model_io.load({})


def test_the_file_is_not_touched(path: Path) -> None:
    before, stat = path.read_bytes(), path.stat()
    weights(model_io.load(path))
    assert path.read_bytes() == before
    assert path.stat().st_mtime_ns == stat.st_mtime_ns


class TestUnreadable:
    def refuse(self, path: Path, match: str) -> None:
        with pytest.raises(ModelError, match=match) as caught:
            model_io.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_missing(self, tmp_path: Path) -> None:
        self.refuse(tmp_path / "none.onnx", "does not exist")

    def test_folder(self, tmp_path: Path) -> None:
        self.refuse(tmp_path, "is a folder")

    def test_empty(self, path: Path) -> None:
        path.write_bytes(b"")
        self.refuse(path, "is empty")

    def test_truncated_anywhere(self, path: Path) -> None:
        whole = path.read_bytes()
        lengths = {*range(1, 200, 13), *range(200, len(whole), len(whole) // 60), len(whole) - 1}
        for length in sorted(lengths):
            path.write_bytes(whole[:length])
            self.refuse(path, "truncated|not an ONNX|not a valid ONNX|made by no node|needs .* bytes")

    @pytest.mark.parametrize(
        "content",
        [
            b'{"format": "not onnx"}',
            b"PK\x03\x04" + bytes(100),
            bytes(1000),
            b"\xff" * 500,
            b"Gewichte" * 50,
            np.random.default_rng(0).bytes(5000),
        ],
        ids=["json", "zip", "zeros", "ones", "text", "noise"],
    )
    def test_something_else(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        self.refuse(path, "not an ONNX")

    def test_another_protobuf_message(self, path: Path) -> None:
        path.write_bytes(numpy_helper.from_array(np.ones(5000, np.float32), "t").SerializeToString())
        self.refuse(path, "ONNX")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_without_permission(self, path: Path) -> None:
        path.chmod(0)
        self.refuse(path, "cannot be read")

    def test_random_damage_is_an_error_or_harmless(self, path: Path) -> None:
        """Whatever a byte is changed to: a message, or a model; never another exception."""
        whole = bytearray(path.read_bytes())
        rng = np.random.default_rng(0)
        start = len(whole) - 1200  # the structure behind the weights
        outcomes = set()
        for _ in range(150):
            broken = bytearray(whole)
            place = int(rng.integers(0, 400) if rng.integers(2) else rng.integers(start, len(whole)))
            broken[place] = int(rng.integers(256))
            path.write_bytes(bytes(broken))
            try:
                model_io.load(path)
                outcomes.add("fine")
            except ModelError:
                outcomes.add("refused")
        assert outcomes == {"fine", "refused"}


class TestInvalid:
    """Graphs that are no graphs."""

    def refuse(self, model: onnx.ModelProto, match: str) -> None:
        with pytest.raises(ModelError, match=match):
            Graph(model_io.load(model))

    def test_custom_operators_are_named(self) -> None:
        model = small_model()
        model.graph.node[1].domain = "acme.ops"
        model.graph.node[1].op_type = "FancyRelu"
        model.opset_import.append(helper.make_opsetid("acme.ops", 1))
        self.refuse(model, r"custom operators that ONNX Runtime does not know: acme\.ops::FancyRelu\. Replace")

    def test_custom_operators_inside_a_body_are_named(self) -> None:
        model = small_model()
        inner = helper.make_graph(
            [helper.make_node("Deep", [], ["z"], domain="acme.ops")],
            "body",
            [],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])],
        )
        model.graph.node.append(helper.make_node("If", ["c"], ["z2"], then_branch=inner, else_branch=inner))
        self.refuse(model, r"acme\.ops::Deep")

    def test_unknown_operator_of_onnx_itself(self) -> None:
        model = small_model()
        model.graph.node[1].op_type = "Rleu"
        self.refuse(model, "not a valid ONNX model.*Rleu")

    def test_missing_tensor(self) -> None:
        model = small_model()
        model.graph.node[2].input[0] = "nowhere"
        self.refuse(model, "nowhere")

    def test_cycle(self) -> None:
        model = small_model()
        model.graph.node[0].input[0] = model.graph.node[2].output[0]
        self.refuse(model, "not a valid ONNX model|cycle")

    def test_name_made_twice(self) -> None:
        model = small_model()
        model.graph.node[1].output[0] = model.graph.node[0].output[0]
        self.refuse(model, "not a valid ONNX model|twice")

    def test_no_nodes(self) -> None:
        model = small_model()
        del model.graph.node[:]
        self.refuse(model, "no nodes")

    def test_weights_that_do_not_fill_their_shape(self) -> None:
        model = small_model()
        model.graph.initializer[0].dims[0] += 1
        self.refuse(model, r"needs \d+ bytes and has \d+")

    def test_absurd_shapes_allocate_nothing(self) -> None:
        model = small_model()
        model.graph.initializer[0].dims[0] = 2**55
        self.refuse(model, r"needs \d+ bytes")

    def test_negative_size(self) -> None:
        model = small_model()
        model.graph.initializer[0].dims[0] = -8
        self.refuse(model, "negative size")

    def test_unknown_type(self) -> None:
        model = small_model()
        model.graph.initializer[0].data_type = 99
        self.refuse(model, "unknown type|not a valid")


def test_functions_are_inlined() -> None:
    function = helper.make_function(
        "local.ops", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    model = small_model()
    relu = model.graph.node[1]
    relu.op_type, relu.domain = "Twice", "local.ops"
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local.ops", 1))
    loaded = model_io.load(model)
    assert not loaded.functions
    assert "Add" in {n.op_type for n in loaded.graph.node}
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    for a, b in zip(outputs_of(model, feeds), outputs_of(loaded, feeds), strict=True):
        assert distance(a, b) <= 1e-6


# -- external data ---------------------------------------------------------------------------------
@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A model with its weights in another file."""
    folder = tmp_path / "external"
    folder.mkdir()
    model = onnx.ModelProto()
    model.CopyFrom(small_model())
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=64)
    return folder / "m.onnx"


class TestExternalData:
    def test_round_trip(self, external: Path, tmp_path: Path) -> None:
        model = model_io.load(external)
        assert_same_weights(model, small_model())
        assert model_io.data_files(external) == {external.parent / "weights.bin"}
        target = tmp_path / "out" / "copy.onnx"
        model_io.save(model, target, external=True)
        assert sorted(p.name for p in target.parent.iterdir()) == ["copy.onnx", "copy.onnx.data"]
        assert model_io.bytes_on_disk(target) == sum(p.stat().st_size for p in target.parent.iterdir())
        shutil.rmtree(external.parent)  # the copy does not need the original
        assert_same_weights(model_io.load(target), small_model())
        onnx.checker.check_model(str(target), full_check=True)
        assert_same_weights(onnx.load(target), small_model())

    def test_weights_can_come_in(self, external: Path, tmp_path: Path) -> None:
        model_io.save(model_io.load(external), tmp_path / "one.onnx")
        assert not model_io.data_files(tmp_path / "one.onnx")
        assert_same_weights(onnx.load(tmp_path / "one.onnx"), small_model())

    def test_missing_data(self, external: Path) -> None:
        (external.parent / "weights.bin").unlink()
        with pytest.raises(ModelError, match=r"is stored in weights\.bin, which does not exist"):
            model_io.load(external)

    def test_short_data(self, external: Path) -> None:
        file = external.parent / "weights.bin"
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(ModelError, match=r"needs bytes \d+ to \d+ of weights\.bin, which has 100"):
            model_io.load(external)

    @pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", ""])
    def test_data_elsewhere_is_not_read(self, external: Path, location: str) -> None:
        change_external(external, "location", location)
        with pytest.raises(ModelError, match="points outside the model's folder"):
            model_io.load(external)

    @pytest.mark.parametrize("key", ["offset", "length"])
    @pytest.mark.parametrize("value", ["many", "-1", "99999999999"])
    def test_nonsense_positions(self, external: Path, key: str, value: str) -> None:
        change_external(external, key, value)
        with pytest.raises(ModelError, match=r"no number|needs bytes"):
            model_io.load(external)

    def test_a_link_out_of_the_folder_is_not_followed(self, external: Path, tmp_path: Path) -> None:
        file = external.parent / "weights.bin"
        shutil.move(file, tmp_path / "secret.bin")
        file.symlink_to(tmp_path / "secret.bin")
        with pytest.raises(ModelError, match="points outside the model's folder"):
            model_io.load(external)


def change_external(path: Path, key: str, value: str) -> None:
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    entry = {e.key: e.value for e in tensor.external_data} | {key: value}
    del tensor.external_data[:]
    for k, v in entry.items():
        tensor.external_data.add(key=k, value=v)
    path.write_bytes(model.SerializeToString())


def assert_same_weights(a: onnx.ModelProto, b: onnx.ModelProto) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


# -- writing ---------------------------------------------------------------------------------------
class TestSave:
    def test_what_is_written_is_what_was_given(self, path: Path, tmp_path: Path) -> None:
        model = model_io.load(path)
        model_io.save(model, tmp_path / "new" / "folder" / "copy.onnx")
        assert_same(onnx.load(tmp_path / "new" / "folder" / "copy.onnx"), onnx.load(path))

    def test_permissions_are_those_of_an_ordinary_file(self, path: Path, tmp_path: Path) -> None:
        model_io.save(model_io.load(path), tmp_path / "copy.onnx")
        (tmp_path / "plain").touch()
        assert (tmp_path / "copy.onnx").stat().st_mode == (tmp_path / "plain").stat().st_mode

    @pytest.mark.parametrize("external", [False, True])
    @pytest.mark.parametrize("there", [False, True], ids=["new", "existing"])
    def test_a_full_disk_leaves_nothing_behind(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, there: bool
    ) -> None:
        folder = tmp_path / "out"
        folder.mkdir()
        if there:
            (folder / "copy.onnx").write_bytes(b"old")
        model = model_io.load(path)
        fail_writing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OutputError, match=r"cannot write .*copy\.onnx: No space left on device"):
            model_io.save(model, folder / "copy.onnx", external=external)
        monkeypatch.undo()
        assert [p.name for p in folder.iterdir()] == (["copy.onnx"] if there else [])
        assert not there or (folder / "copy.onnx").read_bytes() == b"old"

    @pytest.mark.parametrize("external", [False, True])
    def test_an_interrupt_leaves_nothing_behind(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
    ) -> None:
        folder = tmp_path / "out"
        folder.mkdir()
        model = model_io.load(path)
        fail_writing(monkeypatch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            model_io.save(model, folder / "copy.onnx", external=external)
        monkeypatch.undo()
        assert list(folder.iterdir()) == []

    def test_a_file_where_a_folder_should_be(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for external in (False, True):
            with pytest.raises(OutputError, match="cannot write"):
                model_io.save(model_io.load(path), tmp_path / "file" / "copy.onnx", external=external)


def fail_writing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the disk fill up (or the user interrupt) after some bytes."""
    write_bytes, opened = Path.write_bytes, Path.open

    def fail(self: Path, data: bytes) -> int:
        write_bytes(self, data[:100])
        raise error

    class Full:
        def __init__(self, file: object) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def tell(self) -> int:
            return self.file.tell()

        def write(self, data: bytes) -> int:
            if len(data):
                self.file.write(bytes(data)[:10])
                raise error
            return 0

    def open_full(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        file = opened(self, mode, *args, **kwargs)
        return Full(file) if "w" in mode and self.suffix in (".data", ".part") else file

    monkeypatch.setattr(Path, "write_bytes", fail)
    monkeypatch.setattr(Path, "open", open_full)


# -- checking --------------------------------------------------------------------------------------
class TestCheck:
    def test_valid(self) -> None:
        model_io.check(small_model())

    @pytest.mark.parametrize(
        "damage",
        [
            lambda m: m.graph.node[2].input.__setitem__(0, "nowhere"),
            lambda m: m.graph.output[0].type.tensor_type.shape.dim[1].__setattr__("dim_value", 77),
            lambda m: (
                m.graph.initializer[0].dims.__setitem__(0, 3) or m.graph.initializer[0].__setattr__("raw_data", b"")
            ),
        ],
        ids=["missing tensor", "output shape", "weight shape"],
    )
    def test_invalid_results_are_refused(self, damage: Callable[[onnx.ModelProto], object]) -> None:
        model = small_model()
        damage(model)
        with pytest.raises(ModelError, match="the result is not a valid ONNX model"):
            model_io.check(model)

    def test_what_inference_cannot_do_with_the_original_is_not_held_against_the_result(self) -> None:
        model = small_model()
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 77
        model_io.check(model, model)
        broken = small_model()
        broken.graph.node[2].input[0] = "nowhere"
        with pytest.raises(ModelError):
            model_io.check(broken, model)
