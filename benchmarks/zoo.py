"""Export the architectures of the coverage benchmark to ONNX, with random weights.

    python benchmarks/zoo.py FOLDER [NAME ...] [--exporter torchscript|dynamo]

Needs torchvision and timm (``pip install --no-deps torchvision timm`` beside a CPU build of torch). Weights are random;
BatchNorm scales, shifts and statistics, biases and layer scales are randomised too, so that a wrong index cannot hide
behind equal values.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

TORCHVISION = [
    "alexnet",
    "vgg16_bn",
    "vgg19",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_y_400mf",
    "regnet_x_400mf",
    "squeezenet1_1",
    "shufflenet_v2_x1_0",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
    "maxvit_t",
]
TIMM = [
    "ghostnet_100",
    "hrnet_w18_small",
    "res2net50_26w_4s",
    "dpn68",
    "skresnet18",
    "resnest14d",
    "cspdarknet53",
    "repvgg_a0",
    "mobileone_s0",
    "dla34",
    "ese_vovnet19b_dw",
    "rexnet_100",
    "mixnet_s",
    "xception41",
    "selecsls42b",
    "poolformer_s12",
    "mobilevit_s",
    "edgenext_small",
    "fastvit_t8",
    "convmixer_768_32",
    "eca_nfnet_l0",
    "mobilenetv4_conv_small",
    "levit_128s",
    "vit_tiny_patch16_224",
]
ARCHITECTURES = (*TORCHVISION, *TIMM)


def declare_torchvision_operators() -> None:
    """Let a torchvision wheel built for CUDA import beside a CPU build of torch: its C++ library cannot load there, so
    the two operators that it registers fake kernels for are declared by hand (they are not used here)."""
    global _library
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def build(name: str) -> torch.nn.Module:
    """Return an architecture in evaluation mode with randomised weights."""
    torch.manual_seed(0)
    if name in TIMM:
        import timm

        model = timm.create_model(name, pretrained=False, exportable=True)
    else:
        import torchvision

        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **extra)
    randomise(model)
    return model.eval()


def randomise(model: torch.nn.Module) -> None:
    """Make every vector (scales, shifts, biases, statistics) and every all-equal tensor random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.dim() == 1 or bool((tensor == tensor.flatten()[0]).all()):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))


def image_size(name: str, model: torch.nn.Module) -> int:
    """Side of the square input that the architecture is made for."""
    if name == "inception_v3":
        return 299
    config = getattr(model, "default_cfg", None) or {}
    return config["input_size"][-1] if config else 224


def export(name: str, path: Path, exporter: str = "torchscript") -> None:
    """Write one architecture."""
    model = build(name)
    image = torch.randn(1, 3, image_size(name, model), image_size(name, model))
    torch.backends.mha.set_fastpath_enabled(False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            torch.onnx.export(model, (image,), str(path), dynamo=True, external_data=False, verbose=False)
        else:
            torch.onnx.export(model, (image,), str(path), dynamo=False, opset_version=17)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--exporter", default="torchscript", choices=("torchscript", "dynamo"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    declare_torchvision_operators()
    for name in options.names or ARCHITECTURES:
        path = options.folder / f"{name}.onnx"
        if path.exists():
            continue
        started = time.perf_counter()
        try:
            export(name, path.with_suffix(".part"), options.exporter)
            path.with_suffix(".part").rename(path)
            print(f"{name}: {path.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s", flush=True)
        except Exception as error:  # one architecture that does not export must not stop the others
            print(
                f"{name}: not exported: {type(error).__name__}: {str(error).splitlines()[0]}",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    main()
