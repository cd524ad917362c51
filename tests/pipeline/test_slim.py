"""The whole stage: a file in, a smaller file and a report out, or an error and nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from pydantic import ValidationError

from prune_onnx.graph_ops import masked, model_io
from prune_onnx.graph_ops.errors import ConfigError, ModelError, OutputError, PlanError, VerificationError
from prune_onnx.pipeline import slim as stage
from prune_onnx.pipeline.count import count
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig, SlimResult

from ..graph_ops.builder import Net, distance, outputs_of

PAD = {"pads": [1, 1, 1, 1]}


def residual_net(dead: float = 0.0) -> onnx.ModelProto:
    """A small residual net with BatchNorm; a part of the inner channels of every block is dead, with a voice."""
    net = Net()
    y = net.relu(net.bn(net.conv(net.input("N", 3, 10, 10), 16, name="stem", bias=False, **PAD)))
    for i in range(2):
        gamma = np.where(np.arange(24) < 24 * dead, 0, net.positive(24))
        z = net.relu(net.bn(net.conv(y, 24, name=f"inner{i}", bias=False, **PAD), gamma=gamma, beta=net.positive(24)))
        y = net.relu(net.op("Add", y, net.bn(net.conv(z, 16, name=f"outer{i}", bias=False, **PAD))))
    model = net.model(net.head(y))
    model.metadata_props.add(key="labels", value="a,b,c")
    return model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    onnx.save(residual_net(), path)
    return path


@pytest.fixture
def dying(tmp_path: Path) -> Path:
    path = tmp_path / "dying.onnx"
    onnx.save(residual_net(0.5), path)
    return path


def costs(path: Path) -> tuple[int, int]:
    """Parameters and MACs of a file."""
    found = count(model_io.load(path))
    return found.params, found.macs


def run(source: Path, **options: object) -> SlimResult:
    return slim(SlimConfig(input=source, **{"output": source.with_name("out.onnx"), **options}))


def feeds(batch: int = 4) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(9).standard_normal((batch, 3, 10, 10)).astype(np.float32)}


def left(folder: Path) -> set[str]:
    """Files in a folder, hidden ones too."""
    return set(os.listdir(folder))


class TestExact:
    def test_the_output_stays(self, dying: Path) -> None:
        before = dying.read_bytes()
        result = run(dying)
        assert dying.read_bytes() == before
        old, new = onnx.load(dying), onnx.load(dying.with_name("out.onnx"))
        for a, b in zip(outputs_of(old, feeds()), outputs_of(new, feeds()), strict=True):
            assert distance(a, b) <= 1e-5
        assert result.budget == "exact"
        assert result.criterion is None
        assert result.verification.reference == "original"
        assert result.verification.max_rel_diff <= 1e-5
        # Half of each inner layer is dead and padded: all but one representative go.
        kept = {g.name: (g.channels, g.kept) for g in result.groups}
        assert kept["inner0"] == kept["inner1"] == (24, 13)
        assert result.constants["merged"] == 22
        assert result.removed.groups == 2
        assert result.removed.channels == 22
        assert result.after.params < result.before.params

    def test_the_report_counts_what_is_in_the_file(self, dying: Path) -> None:
        result = run(dying, report=dying.with_name("report.json"))
        out = dying.with_name("out.onnx")
        assert (result.after.params, result.after.macs) == costs(out)
        assert (result.before.params, result.before.macs) == costs(dying)
        assert result.after.bytes == out.stat().st_size
        assert result.before.bytes == dying.stat().st_size
        raw = json.loads(dying.with_name("report.json").read_text())
        assert raw["command"] == "slim"
        assert raw["schema_version"] >= 1
        assert raw["after"] == {"params": result.after.params, "macs": result.after.macs, "bytes": result.after.bytes}
        assert set(raw["verification"]) >= {"reference", "max_abs_diff", "max_rel_diff", "passed"}
        assert {"name", "channels", "kept", "pinned_by"} <= set(raw["groups"][0])

    def test_a_living_net_stays_as_it_is(self, source: Path) -> None:
        result = run(source)
        assert result.removed.channels == 0
        assert any("nothing was removed" in note for note in result.notes)
        old, new = onnx.load(source), onnx.load(source.with_name("out.onnx"))
        assert {t.name: t.raw_data for t in old.graph.initializer} == {
            t.name: t.raw_data for t in new.graph.initializer
        }

    def test_running_it_again_removes_nothing_more(self, dying: Path) -> None:
        run(dying)
        again = slim(SlimConfig(input=dying.with_name("out.onnx"), output=dying.with_name("again.onnx")))
        assert again.removed.channels == 0

    def test_aligned_widths_keep_dead_channels(self, dying: Path) -> None:
        result = run(dying, align=8)
        assert {g.name: g.kept for g in result.groups}["inner0"] == 16
        assert result.verification.reference == "original"

    def test_a_dead_branch_disappears(self, tmp_path: Path) -> None:
        net = Net()
        y = net.relu(net.conv(net.input("N", 3, 10, 10), 8, name="stem", **PAD))
        z = net.bn(
            net.conv(net.relu(net.conv(y, 12, name="inner")), 8, name="outer"), gamma=np.zeros(8), beta=np.zeros(8)
        )
        y = net.op("Add", net.op("Slice", y, [2, 2], [8, 8], [2, 3]), z)
        onnx.save(net.model(net.head(y)), tmp_path / "in.onnx")
        result = run(tmp_path / "in.onnx")
        assert result.verification.max_rel_diff <= 1e-5
        names = {n.name for n in onnx.load(tmp_path / "out.onnx").graph.node}
        assert not names & {"inner", "outer"}
        assert any("constant" in note for note in result.notes)


class TestBudgets:
    @pytest.mark.parametrize("name", ["keep_macs", "keep_params", "keep_channels"])
    @pytest.mark.parametrize("scope", ["global", "layer"])
    def test_the_budget_is_met_by_the_file(self, source: Path, name: str, scope: str) -> None:
        result = run(source, **{name: 0.6}, scope=scope, align=1)
        params, macs = costs(source.with_name("out.onnx"))
        assert (params, macs) == (result.after.params, result.after.macs)
        if name != "keep_channels":
            share = macs / result.before.macs if name == "keep_macs" else params / result.before.params
            assert 0.55 <= share <= 0.6
        assert result.budget == name
        assert result.criterion == "l2"
        assert result.verification.reference == "masked"
        old, new = onnx.load(source), onnx.load(source.with_name("out.onnx"))
        assert distance(outputs_of(old, feeds())[0], outputs_of(new, feeds())[0]) > 1e-2

    @pytest.mark.parametrize("criterion", ["l1", "l2", "bn-gamma", "random"])
    def test_criteria(self, source: Path, criterion: str) -> None:
        result = run(source, keep_macs=0.5, criterion=criterion)
        assert result.criterion == criterion
        assert result.after.macs <= 0.5 * result.before.macs

    def test_a_budget_that_exact_removal_meets_stays_exact(self, dying: Path) -> None:
        result = run(dying, keep_macs=0.9)
        assert result.verification.reference == "original"
        assert result.after.macs <= 0.9 * result.before.macs

    def test_the_seed_decides_the_random_criterion(self, source: Path) -> None:
        def kept(seed: int) -> bytes:
            run(source, keep_macs=0.5, criterion="random", seed=seed, force=True)
            return b"".join(t.raw_data for t in onnx.load(source.with_name("out.onnx")).graph.initializer)

        assert kept(1) == kept(1)
        assert kept(1) != kept(2)

    def test_an_unreachable_budget_writes_nothing(self, source: Path) -> None:
        there = left(source.parent)
        with pytest.raises(PlanError, match=r"--keep-macs 0\.001 cannot be reached.* has 0\.\d+\."):
            run(source, keep_macs=0.001, report=source.with_name("report.json"))
        assert left(source.parent) == there

    def test_norms_and_ignore(self, source: Path) -> None:
        result = run(source, keep_channels=0.5, ignore=("inner*",), align=1)
        groups = {g.name: g for g in result.groups}
        assert groups["inner0"].kept == 24
        assert any("--ignore inner*" in reason for reason in groups["inner0"].pinned_by)
        with pytest.raises(ConfigError, match="'nothing' matches no node"):
            run(source, ignore=("nothing",), force=True)

    def test_fold_bn(self, source: Path) -> None:
        result = run(source, keep_macs=0.6, fold_bn=True)
        ops = {n.op_type for n in onnx.load(source.with_name("out.onnx")).graph.node}
        assert "BatchNormalization" not in ops
        assert any("folded 5 BatchNormalization" in note for note in result.notes)

    def test_unknown_criterion(self, source: Path) -> None:
        with pytest.raises(ConfigError, match=r"unknown criterion 'l3'"):
            run(source, keep_macs=0.5, criterion="l3")

    def test_bn_gamma_without_norms(self, tmp_path: Path) -> None:
        net = Net()
        onnx.save(net.model(net.head(net.conv(net.input(1, 3, 8, 8), 8))), tmp_path / "in.onnx")
        with pytest.raises(ConfigError, match="needs BatchNormalization"):
            run(tmp_path / "in.onnx", keep_macs=0.5, criterion="bn-gamma")
        assert left(tmp_path) == {"in.onnx"}


class TestPlans:
    def test_a_dry_run_writes_the_plan_only_and_the_plan_is_the_cut(self, source: Path) -> None:
        plan = source.with_name("plan.json")
        dry = run(source, keep_macs=0.5, dry_run=True, plan=plan, output=None)
        assert left(source.parent) == {"in.onnx", "plan.json"}
        assert dry.dry_run
        assert dry.output is None
        wet = run(source, keep_macs=0.5)
        direct = source.with_name("out.onnx").read_bytes()
        replay = run(source, plan=plan, output=source.with_name("replay.onnx"))
        assert (
            (dry.after.params, dry.after.macs)
            == (wet.after.params, wet.after.macs)
            == (replay.after.params, replay.after.macs)
        )
        assert [g.kept for g in dry.groups] == [g.kept for g in replay.groups]
        one, two = onnx.load_from_string(direct), onnx.load(source.with_name("replay.onnx"))
        del one.metadata_props[:], two.metadata_props[:]
        assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)
        assert replay.budget == "plan"

    def test_the_plan_of_another_model(self, source: Path, tmp_path: Path) -> None:
        plan = tmp_path / "plan.json"
        run(source, keep_macs=0.5, dry_run=True, plan=plan, output=None)
        net = Net()
        onnx.save(net.model(net.head(net.conv(net.input(1, 3, 8, 8), 8))), tmp_path / "other.onnx")
        with pytest.raises(PlanError, match="made for another model"):
            run(tmp_path / "other.onnx", plan=plan)

    @pytest.mark.parametrize("content", [None, "{", "\xff\xfe", "[]"])
    def test_what_is_no_plan(self, source: Path, content: str | None) -> None:
        plan = source.with_name("plan.json")
        if content is not None:
            plan.write_bytes(content.encode("latin-1"))
        with pytest.raises(PlanError, match=r"plan\.json"):
            run(source, plan=plan)
        assert not source.with_name("out.onnx").exists()


class TestFiles:
    def test_the_input_is_never_the_output(self, source: Path) -> None:
        link = source.with_name("link.onnx")
        link.symlink_to(source)
        for target in (source, link, source.parent / "x" / ".." / "in.onnx"):
            with pytest.raises(OutputError, match=r"is the input|not a"):
                run(source, output=target, force=True)

    @pytest.mark.parametrize("name", ["out.onnx", "report.json"])
    def test_outputs_are_not_overwritten(self, source: Path, name: str) -> None:
        source.with_name(name).write_text("precious")
        options = {"report": source.with_name("report.json")}
        with pytest.raises(OutputError, match=f"{name} exists already"):
            run(source, **options)
        assert source.with_name(name).read_text() == "precious"
        run(source, force=True, **options)
        assert source.with_name(name).read_bytes() != b"precious"

    def test_a_failed_verification_writes_nothing(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        right = masked.masked_reference

        def wrong(*args: object) -> onnx.ModelProto:
            model = right(*args)
            for tensor in model.graph.initializer:
                if tensor.name == model.graph.node[-1].input[2]:
                    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + 1, tensor.name))
            return model

        monkeypatch.setattr(stage, "masked_reference", wrong)
        there = left(source.parent)
        with pytest.raises(VerificationError, match="Nothing was written"):
            run(source, keep_macs=0.5, report=source.with_name("report.json"))
        assert left(source.parent) == there

    def test_a_missing_input(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="does not exist"):
            run(tmp_path / "none.onnx")
        assert left(tmp_path) == set()

    def test_external_data_stays_external(self, tmp_path: Path) -> None:
        folder = tmp_path / "in"
        folder.mkdir()
        source = folder / "m.onnx"
        onnx.save(residual_net(), source, save_as_external_data=True, location="m.bin", size_threshold=256)
        result = slim(SlimConfig(input=source, output=tmp_path / "out" / "small.onnx", keep_macs=0.6))
        assert left(tmp_path / "out") == {"small.onnx", "small.onnx.data"}
        assert left(folder) == {"m.onnx", "m.bin"}
        assert result.before.bytes == sum(p.stat().st_size for p in folder.iterdir())
        assert result.after.bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
        inside = tmp_path / "inside.onnx"
        onnx.save(residual_net(), inside)
        slim(SlimConfig(input=inside, output=tmp_path / "whole.onnx", keep_macs=0.6))
        a, b = onnx.load(tmp_path / "out" / "small.onnx"), onnx.load(tmp_path / "whole.onnx")
        np.testing.assert_array_equal(outputs_of(a, feeds())[0], outputs_of(b, feeds())[0])

    def test_metadata_is_kept_and_history_added(self, source: Path) -> None:
        run(source, keep_macs=0.7)
        slim(
            SlimConfig(input=source.with_name("out.onnx"), output=source.with_name("again.onnx"), keep_macs=0.8, seed=3)
        )
        props = {p.key: p.value for p in onnx.load(source.with_name("again.onnx")).metadata_props}
        assert props["labels"] == "a,b,c"
        history = json.loads(props["prune_onnx.slim"])
        assert [(h["budget"], h["fraction"], h["seed"]) for h in history] == [
            ("keep_macs", 0.7, 0),
            ("keep_macs", 0.8, 3),
        ]


class TestConfig:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"keep_macs": 0.5, "keep_params": 0.5}, "keep_macs and keep_params exclude each other"),
            ({"exact": True, "keep_macs": 0.5}, "exact and keep_macs exclude each other"),
            ({"keep_macs": 0.0}, "greater than 0"),
            ({"keep_macs": 1.5}, "less than or equal to 1"),
            ({"output": None}, "output is missing"),
            ({"align": 0}, "align must be 1 or more"),
            ({"plan": "p.json", "keep_macs": 0.5}, "plan replays a saved plan"),
            ({"scope": "local"}, "'global' or 'layer'"),
            ({"keep_mac": 0.5}, "keep_mac"),
        ],
    )
    def test_what_does_not_go_together(self, options: dict, match: str) -> None:
        with pytest.raises(ValidationError, match=match):
            SlimConfig(**{"input": "in.onnx", "output": "out.onnx", **options})


# -- real files ------------------------------------------------------------------------------------------------------
def shared_models() -> list[Path]:
    """The example files: in PRUNE_ONNX_SHARED, or in ``../shared/data/onnx`` beside the repository."""
    beside = Path(__file__).parents[3] / "shared" / "data" / "onnx"
    folder = Path(os.environ["PRUNE_ONNX_SHARED"]) if "PRUNE_ONNX_SHARED" in os.environ else beside
    return sorted(folder.glob("**/*.onnx"))


MODELS = {path.stem: path for path in shared_models()}
NAMES = [
    "espcn-subpixel",
    "light_resnet50",
    "light_squeezenet",
    pytest.param("light_vgg19", marks=pytest.mark.slow),
    "mnist-cntk",
    "resnet20-cifar10",
    "resnet56-cifar10",
    "ultraface-slim-320",
]


@pytest.fixture
def example(request: pytest.FixtureRequest) -> Path:
    if request.param not in MODELS:
        pytest.skip(f"{request.param}.onnx is not in PRUNE_ONNX_SHARED or ../shared/data/onnx")
    return MODELS[request.param]


@pytest.mark.parametrize("example", NAMES, indirect=True)
def test_real_models_at_half_their_macs(example: Path, tmp_path: Path) -> None:
    before = example.read_bytes()
    result = slim(SlimConfig(input=example, output=tmp_path / "out.onnx", keep_macs=0.5))
    assert example.read_bytes() == before
    assert result.verification.reference == "masked"
    assert 0.4 * result.before.macs <= result.after.macs <= 0.5 * result.before.macs
    if not example.stem.startswith("light_"):  # their weights are made by the graph itself
        assert result.after.bytes < result.before.bytes
    onnx.checker.check_model(str(tmp_path / "out.onnx"))


@pytest.mark.parametrize(
    "example", ["espcn-subpixel", "mnist-cntk", "resnet20-cifar10", "ultraface-slim-320"], indirect=True
)
def test_real_models_exactly(example: Path, tmp_path: Path) -> None:
    result = slim(SlimConfig(input=example, output=tmp_path / "out.onnx"))
    assert result.verification.reference == "original"
    assert result.verification.max_rel_diff <= 1e-5
    assert result.after.macs <= result.before.macs
