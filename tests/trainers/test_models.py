"""Networks: counts of the papers to the unit, shapes, widths, exportability, and factories of the user's own."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.trainers.models import MODELS, build_model
from prune_onnx.trainers.models.resnet_stages import NARROW, FourStages

GREY = ("bn-cnn", "lenet300", "lenet5", "lenet5-bn", "frank-wolfe-cnn")
REPEATED = ("resnet56", "resnet56-b", "resnet110", "resnet110-b", "resnet34", "resnet34-7x7", "preresnet164")
"""Deeper forms of other networks; nothing but the number of blocks is theirs."""

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

# name: (parameters, BatchNorm channels, MACs of convolutions and linear layers), 10 classes, 32x32 (28x28 where grey)
COUNTS = {
    "bn-cnn": (93_546, 224, 7_451_776),
    "lenet300": (266_610, 0, 266_200),
    "lenet5": (431_080, 0, 2_293_000),
    "lenet5-bn": (431_650, 570, 2_293_000),
    "frank-wolfe-cnn": (34_826, 0, 2_440_960),
    "vgg11": (9_228_362, 2752, 152_769_536),
    "vgg13": (9_941_322, 2944, 228_791_296),
    "vgg14": (14_728_266, 4224, 313_201_664),
    "vgg16": (14_724_042, 4224, 313_201_664),
    "vgg19": (20_035_018, 5504, 398_136_320),
    "vgg-like": (14_990_922, 4224, 313_463_808),
    "resnet20": (269_722, 688, 40_551_040),
    "resnet32": (464_154, 1136, 68_862_592),
    "resnet56": (853_018, 2032, 125_485_696),
    "resnet110": (1_727_962, 4048, 252_887_680),
    "resnet20-b": (272_474, 784, 40_813_184),
    "resnet32-b": (466_906, 1232, 69_124_736),
    "resnet56-b": (855_770, 2128, 125_747_840),
    "resnet110-b": (1_730_714, 4144, 253_149_824),
    "resnet18": (11_173_962, 4800, 555_422_720),
    "resnet34": (21_282_122, 8512, 1_159_402_496),
    "resnet18-7x7": (11_181_642, 4800, 37_016_576),
    "resnet34-7x7": (21_289_802, 8512, 74_765_312),
    "resnet18-narrow": (701_466, 1200, 35_046_656),
    "preresnet110": (1_146_842, 8080, 167_430_656),
    "preresnet164": (1_703_258, 12_112, 247_646_720),
    "densenet40": (1_059_298, 9360, 282_917_328),
}
HUNDRED_CLASSES = {
    "vgg19": 20_081_188,
    "vgg16": 14_770_212,
    "vgg14": 14_774_436,
    "vgg-like": 15_037_092,
    "vgg13": 9_987_492,
    "resnet20": 275_572,
    "resnet32": 470_004,
    "resnet56": 858_868,
    "resnet110": 1_733_812,
    "preresnet164": 1_726_388,
    "densenet40": 1_100_428,
}
TINY_IMAGENET = {
    "vgg16": 14_821_512,
    "resnet18": 11_271_432,
    "resnet34": 21_379_592,
    "resnet18-7x7": 11_279_112,
    "resnet34-7x7": 21_387_272,
    "resnet18-narrow": 725_976,
}
# FLOPs as the code of proximal network slimming counts them; the last average is a module there, but not in VGG.
PROXIMAL_FLOPS = {
    "vgg19": (797_304_842, 0),
    "preresnet110": (341_230_602, 256 * 64),
    "preresnet164": (504_759_306, 256 * 64),
    "densenet40": (573_052_330, 456 * 64),
}
# FLOPs by NNrelief's formulas (appendix B), with a layer's output size.
NNRELIEF_FLOPS = {
    "lenet300": 531_990, "lenet5": 4_614_930, "vgg-like": 627_480_054, "resnet20": 81_478_902, "resnet56": 252_036_342,
}  # fmt: skip

SMALLEST = {"lenet5": 16, "lenet5-bn": 16, "frank-wolfe-cnn": 10, "vgg13": 32, "vgg-like": 32} | dict.fromkeys(
    ("vgg11", "vgg14", "vgg16", "vgg19"), 16
)


def shape_of(name: str) -> tuple[int, int, int]:
    return (1, 28, 28) if name in GREY else (3, 32, 32)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def bn_channels(model: nn.Module) -> int:
    return sum(module.num_features for module in model.modules() if isinstance(module, BATCH_NORMS))


def summed(
    name: str, classes: int, in_shape: tuple[int, int, int], cost: Callable[[nn.Module, torch.Tensor], int]
) -> int:
    """Return the sum of ``cost(layer, its output)`` over the layers that one image passes; nothing is computed."""
    total = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        total += cost(module, output)

    with torch.device("meta"):
        model = build_model(name, classes, in_shape).eval()
        for module in model.modules():
            module.register_forward_hook(count)
        model(torch.zeros(1, *in_shape))
    return total


def macs(name: str, in_shape: tuple[int, int, int], classes: int = 10) -> int:
    """Return the multiply-accumulates of convolutions and linear layers."""
    return summed(name, classes, in_shape, multiplications)


def multiplications(layer: nn.Module, output: torch.Tensor) -> int:
    return output.numel() * layer.weight[0].numel() if isinstance(layer, nn.Conv2d | nn.Linear) else 0


def proximal_flops(layer: nn.Module, output: torch.Tensor) -> int:
    """Two a multiplication, one a bias, two a BatchNorm's value and one for the ReLU behind it; pooling windows."""
    if isinstance(layer, BATCH_NORMS):
        return 3 * output.numel()
    if isinstance(layer, nn.MaxPool2d):
        return layer.kernel_size**2 * output.numel()
    biased = isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None
    return 2 * multiplications(layer, output) + biased * output.numel()


def nnrelief_flops(layer: nn.Module, output: torch.Tensor) -> int:
    if isinstance(layer, nn.Linear):
        return (2 * layer.in_features - 1) * layer.out_features
    return 2 * output.numel() * (layer.weight[0].numel() + 1) if isinstance(layer, nn.Conv2d) else 0


def unfilled(name: str, classes: int, in_shape: tuple[int, int, int]) -> nn.Module:
    """Return a network that has shapes, but no values: large ones are made at once."""
    with torch.device("meta"):
        return build_model(name, classes, in_shape)


def test_every_listed_model_has_a_published_count():
    assert list(COUNTS) == MODELS.names()


@pytest.mark.parametrize("name", MODELS.names())
def test_counts_are_the_papers(name):
    model = unfilled(name, 10, shape_of(name))
    assert (parameters(model), bn_channels(model), macs(name, shape_of(name))) == COUNTS[name]


@pytest.mark.parametrize("name", list(HUNDRED_CLASSES))
def test_counts_with_a_hundred_classes(name):
    assert parameters(unfilled(name, 100, (3, 32, 32))) == HUNDRED_CLASSES[name]


@pytest.mark.parametrize("name", list(TINY_IMAGENET))
def test_counts_on_tiny_imagenet(name):
    assert parameters(unfilled(name, 200, (3, 64, 64))) == TINY_IMAGENET[name]


@pytest.mark.parametrize(("name", "count"), [
    ("resnet18-7x7", (11_689_512, 1_814_073_344)), ("resnet34-7x7", (21_797_672, 3_663_761_408)),
])  # fmt: skip
def test_counts_on_imagenet(name, count):
    shape = (3, 224, 224)
    assert (parameters(unfilled(name, 1000, shape)), macs(name, shape, 1000)) == count


def test_nnreliefs_narrow_resnet18_with_a_large_stem_has_its_count():
    with torch.device("meta"):
        model = FourStages("narrow", (2, 2, 2, 2), NARROW, 200, (3, 64, 64), 1.0, "large")
    assert (parameters(model), bn_channels(model)) == (727_896, 1200)


@pytest.mark.parametrize("name", list(PROXIMAL_FLOPS))
def test_flops_as_proximal_network_slimming_counts_them(name):
    published, last_average = PROXIMAL_FLOPS[name]
    assert summed(name, 10, (3, 32, 32), proximal_flops) + last_average == published


@pytest.mark.parametrize("name", list(NNRELIEF_FLOPS))
def test_flops_as_nnrelief_counts_them(name):
    assert summed(name, 10, shape_of(name), nnrelief_flops) == NNRELIEF_FLOPS[name]


@pytest.mark.parametrize("name", MODELS.names())
def test_docstring_names_the_count(name):
    module, _, factory = MODELS.get(name).partition(":")
    source = importlib.import_module(f"prune_onnx.trainers.models.{module}")
    assert f"{COUNTS[name][0]:,}".replace(",", " ") in getattr(source, factory).__doc__


@pytest.mark.parametrize("name", MODELS.names())
@pytest.mark.parametrize("in_shape", [(1, 32, 32), (3, 33, 40), (3, 64, 64)], ids=str)
def test_gives_logits_at_any_size_from_32(name, in_shape):
    model = build_model(name, 7, in_shape, width=0.125).eval()
    assert model(torch.randn(2, *in_shape)).shape == (2, 7)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "lenet300"])
def test_smallest_size_works_and_smaller_ones_are_refused(name):
    least = SMALLEST.get(name, 8)
    model = build_model(name, 7, (1, least, least), width=0.125).eval()
    assert model(torch.randn(2, 1, least, least)).shape == (2, 7)
    with pytest.raises(ConfigError, match=f"at least {least}x{least} pixels, not 40x{least - 1}"):
        build_model(name, 7, (1, 40, least - 1))


@pytest.mark.parametrize("size", [8, 9, 16, 28, 32, 64])
def test_bn_cnn_takes_any_size(size):
    assert build_model("bn-cnn", 10, (3, size, size))(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_vgg_ends_like_the_papers_two_by_two_average():
    model = build_model("vgg19", 10, (3, 32, 32), width=0.125).eval()
    x = torch.randn(2, 3, 32, 32)
    paper = model.classifier(nn.functional.avg_pool2d(model.features[:-1](x), 2).flatten(1))
    torch.testing.assert_close(model(x), paper, rtol=0, atol=0)


def test_nnrelief_strides_large_images_in_the_first_convolution():
    at_32, at_64 = (unfilled("vgg-like", 10, (3, side, side)) for side in (32, 64))
    assert parameters(at_32) == parameters(at_64)
    assert macs("vgg-like", (3, 64, 64)) == macs("vgg-like", (3, 32, 32))


@pytest.mark.parametrize("name", [name for name in COUNTS if COUNTS[name][1]])
def test_width_scales_every_batch_norm(name):
    with torch.device("meta"):
        assert bn_channels(build_model(name, 10, shape_of(name), width=0.5)) * 2 == COUNTS[name][1]


def test_width_scales_layers_without_batch_norm():
    model = build_model("lenet300", 10, (1, 28, 28), width=0.1)
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [30, 10, 10]


def test_tiny_width_leaves_a_channel_everywhere():
    model = build_model("resnet20", 10, (3, 32, 32), width=1e-6)
    assert {module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)} == {1}
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_option_a_pads_a_quarter_on_both_sides():
    from prune_onnx.trainers.models.resnet import PadShortcut

    x = torch.randn(1, 16, 8, 8)
    y = PadShortcut(16, 32)(x)
    assert y.shape == (1, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REPEATED])
def test_exports_with_open_batch_size(name):
    model = build_model(name, 10, shape_of(name), width=0.125).eval()
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(model, (torch.randn(2, *shape_of(name)),), dynamic_shapes=(batch,)).module()
    x = torch.randn(5, *shape_of(name))
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("name", ["vgg19", "resnet20", "lenet5", "bn-cnn"])
def test_starts_as_he_initialisation_says(name):
    torch.manual_seed(0)
    model = build_model(name, 10, shape_of(name))
    conv = max((m for m in model.modules() if isinstance(m, nn.Conv2d)), key=lambda m: m.weight.numel())
    fan = conv.weight[:, 0].numel() if name in ("vgg19", "bn-cnn") else conv.weight[0].numel()
    assert conv.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.03)
    assert conv.weight.mean().item() == pytest.approx(0, abs=0.03 * (2 / fan) ** 0.5)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


def test_same_seed_gives_same_weights():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_model("bn-cnn", 10, (1, 8, 8)).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not torch.equal(states[0]["features.0.weight"], states[2]["features.0.weight"])


def test_names_are_listed_without_torch():
    code = "import sys; from prune_onnx.trainers.models import MODELS; print(len(list(MODELS)), 'torch' in sys.modules)"
    path = str(Path(__file__).parents[2] / ".typing")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": path, "PATH": ""})
    assert done.stdout.split() == [str(len(COUNTS)), "False"]


def test_unknown_name_gives_close_matches():
    with pytest.raises(ConfigError, match="'resnet20'"):
        build_model("resnet-20", 10, (3, 32, 32))


@pytest.mark.parametrize(("classes", "shape", "width"), [
    (0, (3, 32, 32), 1.0), (10, (3, 32), 1.0), (10, (0, 32, 32), 1.0),
    (10, (3, 32, 32), 0.0), (10, (3, 32, 32), -1.0), (10, (3, 32, 32), float("nan")),
])  # fmt: skip
def test_senseless_sizes_are_refused(classes, shape, width):
    with pytest.raises(ConfigError):
        build_model("lenet300", classes, shape, width)


USER_MODULE = """
import torch
from torch import nn
calls = []
def plain(num_classes, in_shape):
    calls.append((num_classes, in_shape))
    return nn.Sequential(nn.Flatten(), nn.Linear(in_shape[0] * in_shape[1] * in_shape[2], num_classes))
def wide(num_classes, in_shape, width=1.0):
    return nn.Linear(int(100 * width), num_classes)
class Net(nn.Module):
    def __init__(self, num_classes, in_shape):
        super().__init__()
        self.fc = nn.Linear(in_shape[0], num_classes)
def broken(num_classes, in_shape):
    raise RuntimeError("no luck\\ntoday")
def number(num_classes, in_shape):
    return 3
def nothing():
    return nn.Identity()
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module in the current folder, which is not on the path."""
    (tmp_path / "their_nets.py").write_text(USER_MODULE)
    (tmp_path / "their_faulty.py").write_text("import module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "their_nets", raising=False)
    before = list(sys.path)
    yield "their_nets"
    assert sys.path == before
    sys.modules.pop("their_nets", None)


def test_own_factory_is_called_with_classes_and_shape(user_module):
    model = build_model(f"{user_module}:plain", 5, (1, 8, 8))
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    assert sys.modules[user_module].calls == [(5, (1, 8, 8))]


def test_own_class_is_a_factory(user_module):
    assert build_model(f"{user_module}:Net", 5, (3, 8, 8)).fc.in_features == 3


def test_own_factory_gets_the_width_it_knows(user_module):
    assert build_model(f"{user_module}:wide", 5, (1, 8, 8), width=0.5).in_features == 50


@pytest.mark.parametrize(("name", "width", "said"), [
    ("their_nets:plain", 0.5, "width"),
    ("their_nets:broken", 1.0, "RuntimeError: no luck today"),
    ("their_nets:number", 1.0, "not int"),
    ("their_nets:nothing", 1.0, "cannot be called"),
    ("their_nets:plian", 1.0, "Did you mean 'plain'"),
    ("their_nets:calls", 1.0, "no factory 'calls'"),
    ("their_nets:", 1.0, "give package.module:factory"),
    (":plain", 1.0, "give package.module:factory"),
    ("their_nots:plain", 1.0, "No module named 'their_nots'"),
    ("their_faulty:plain", 1.0, "No module named 'module_that_is_not_there'"),
])  # fmt: skip
def test_own_factory_that_fails_is_a_clear_error(user_module, name, width, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build_model(name, 5, (1, 8, 8), width)
    assert "\n" not in str(caught.value)
