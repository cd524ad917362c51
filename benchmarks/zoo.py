"""Export the architectures of the coverage benchmark to ONNX, with random weights.

    python benchmarks/zoo.py FOLDER [NAME ...] [--more] [--exporter torchscript|dynamo] [--dynamic]

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

# Beyond the comparison: other families of timm, torchvision's segmentation models, and a detector.
SEGMENTATION = [
    "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
]
DETECTOR = "detector"
MORE_TIMM = [
    "bat_resnext26ts",
    "botnet26t_256",
    "caformer_s18",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "coatnet_0_rw_224",
    "convmixer_1024_20_ks9_p14",
    "convnext_atto",
    "convnextv2_atto",
    "crossvit_tiny_240",
    "cs3darknet_focus_s",
    "cspresnext50",
    "darknet53",
    "davit_tiny",
    "densenetblur121d",
    "dla46_c",
    "dla60_res2net",
    "dpn48b",
    "ecaresnet26t",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientnet_lite0",
    "efficientvit_b0",
    "efficientvit_m0",
    "fastvit_sa12",
    "fbnetc_100",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gernet_s",
    "ghostnetv2_100",
    "hardcorenas_a",
    "hgnet_tiny",
    "hgnetv2_b0",
    "inception_next_tiny",
    "inception_resnet_v2",
    "inception_v4",
    "lambda_resnet26t",
    "lcnet_100",
    "legacy_seresnet18",
    "legacy_xception",
    "mambaout_femto",
    "maxvit_pico_rw_256",
    "mixer_s32_224",
    "mobilenetv3_small_050",
    "mobilenetv4_hybrid_medium",
    "mobilevitv2_050",
    "nest_tiny",
    "nextvit_small",
    "nf_regnet_b0",
    "poolformerv2_s12",
    "pvt_v2_b0",
    "regnetz_b16",
    "repghostnet_050",
    "repvit_m0_9",
    "res2next50",
    "resmlp_12_224",
    "resnet26t",
    "resnetv2_50",
    "resnetv2_50x1_bit",
    "rexnetr_200",
    "sebotnet33ts_256",
    "sequencer2d_s",
    "seresnet50",
    "seresnext26d_32x4d",
    "shvit_s1",
    "skresnext50_32x4d",
    "starnet_s1",
    "swinv2_cr_tiny_ns_224",
    "tf_efficientnet_b0",
    "tiny_vit_5m_224",
    "tinynet_a",
    "tresnet_m",
    "twins_svt_small",
    "visformer_tiny",
    "vovnet39a",
    "xception41p",
    "xcit_nano_12_p16_224",
]
MORE = (DETECTOR, *SEGMENTATION, *MORE_TIMM)


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
    if name == DETECTOR:
        from detector import Detector

        model = Detector()
    elif name in SEGMENTATION:
        import torchvision

        model = Segmentation(torchvision.models.segmentation.__dict__[name](weights=None, weights_backbone=None))
    elif name not in TORCHVISION:
        import timm

        model = timm.create_model(name, pretrained=False, exportable=True)
    else:
        import torchvision

        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **extra)
    randomise(model)
    return model.eval()


class Segmentation(torch.nn.Module):
    """A segmentation model whose output is its map of scores alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)["out"]


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
    if name == DETECTOR or name in SEGMENTATION:
        return 128
    config = getattr(model, "default_cfg", None) or {}
    return config["input_size"][-1] if config else 224


def export(name: str, path: Path, exporter: str = "torchscript", dynamic: bool = False) -> None:
    """Write one architecture."""
    model = build(name)
    image = torch.randn(2 if dynamic else 1, 3, image_size(name, model), image_size(name, model))
    torch.backends.mha.set_fastpath_enabled(False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            sizes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
            torch.onnx.export(
                model, (image,), str(path), dynamo=True, external_data=False, verbose=False, dynamic_shapes=sizes
            )
        else:
            axes = {"image": {0: "batch"}} if dynamic else None
            torch.onnx.export(
                model, (image,), str(path), dynamo=False, opset_version=17, input_names=["image"], dynamic_axes=axes
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--more", action="store_true", help="the architectures beyond those of the comparison")
    parser.add_argument("--exporter", default="torchscript", choices=("torchscript", "dynamo"))
    parser.add_argument("--dynamic", action="store_true", help="leave the batch size open")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    declare_torchvision_operators()
    for name in options.names or (MORE if options.more else ARCHITECTURES):
        path = options.folder / f"{name}.onnx"
        if path.exists():
            continue
        started = time.perf_counter()
        try:
            export(name, path.with_suffix(".part"), options.exporter, options.dynamic)
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
