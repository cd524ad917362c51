"""Times models before and after ``slim`` on a GPU, in every mode that ``eval`` has.

    python benchmarks/gpu.py [MODEL.onnx ...] [--batch-size 1,32,256] [--out benchmarks/results/gpu]

Without models it exports ResNet-56 and VGG-16 for images of 32 x 32, with fresh weights: speed does not depend on them.
Every model is slimmed to half of its multiply-accumulates and compared with itself. Modes of CUDA: NCHW and NHWC, with
and without TF32, with and without CUDA graphs; of TensorRT, where it is installed: float32 and float16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from prune_onnx.graph_ops.errors import PruneOnnxError
from prune_onnx.graph_ops.files import write_text
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.pipeline.eval_results import EvalResult
from prune_onnx.pipeline.eval_schema import EvalConfig
from prune_onnx.pipeline.evaluate import evaluate
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig

EXPORTED = ("resnet56", "vgg16")
KEEP = 0.5
CUDA = [
    {"cuda_layout": layout, "tf32": tf32, "cuda_graph": graph}
    for layout, tf32, graph in itertools.product(("nchw", "nhwc"), (True, False), (False, True))
]
MODES: dict[str, list[dict[str, Any]]] = {
    "cuda": CUDA,
    "tensorrt": [{"fp16": fp16, "cuda_graph": graph} for fp16, graph in itertools.product((False, True), repeat=2)],
    "cpu": [{}],
}


def exported(folder: Path) -> list[Path]:
    """Export the models that are measured when none are given."""
    from prune_onnx.trainers.export import export_onnx
    from prune_onnx.trainers.models import build_model

    paths = []
    for name in EXPORTED:
        shape = (3, 32, 32)
        path = folder / f"{name}.onnx"
        export_onnx(build_model(name, 10, shape), shape, path, Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3), {})
        paths.append(path)
    return paths


def slimmed(model: Path, folder: Path) -> Path:
    """Write the model with half of its multiply-accumulates."""
    path = folder / f"{model.stem}-slim.onnx"
    slim(SlimConfig(input=model, output=path, keep_macs=KEEP, force=True))
    return path


def row(model: Path, provider: str, mode: dict[str, Any], result: EvalResult) -> list[dict[str, Any]]:
    """Return the figures of one mode, one entry for each batch size; copies and memory belong to the first."""
    assert result.baseline is not None
    return [
        {
            "model": model.stem, "provider": provider, **mode, "batch": timing.batch_size,
            "before_p50_ms": timing.baseline.p50 if timing.baseline else None, "after_p50_ms": timing.model.p50,
            "after_per_s": timing.batch_size * 1e3 / timing.model.mean, "cv": timing.model.cv,
            "speedup": timing.speedup.p50 if timing.speedup else None,
            "ci95": timing.speedup.ci95 if timing.speedup else None,
            "macs_ratio": result.baseline.macs / result.model.macs,
            "copies_ms": result.model.copies_ms.model_dump() if result.model.copies_ms else None,
            "memory": result.model.peak_memory.model_dump() if result.model.peak_memory else None,
        }
        for timing in result.timings
    ]  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    facts = found["environment"]
    gpu = facts.get("gpu_after") or facts.get("gpu") or {}
    clocks = gpu.get("clocks_mhz") or {}
    machine = [
        gpu.get("name", facts["cpu"]),
        *(f"driver {gpu['driver']}" for _ in range("driver" in gpu)),
        *(f"{name} {version}" for name, version in facts.get("libraries", {}).items()),
        *(f"{kind} clock {value} MHz" for kind, value in clocks.items()),
        *(f"{name} {version}" for name, version in facts["versions"].items()),
    ]
    lines = [
        "# Before and after slim, on a GPU", "",
        f"`benchmarks/gpu.sh` · {facts['date']} · " + ", ".join(machine), "",
        f"Medians of a run from device memory to device memory; slimmed to {KEEP:.0%} of the multiply-accumulates. "
        "Convolution algorithms: exhaustive search.", "",
        "| model | mode | batch | before ms | after ms | samples/s | speed-up (95 % interval) | MACs |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]  # fmt: skip
    for each in found["rows"]:
        low, high = each["ci95"]
        lines.append(
            f"| {each['model']} | {mode_text(each)} | {each['batch']} | {each['before_p50_ms']:.4f} "
            f"| {each['after_p50_ms']:.4f} | {each['after_per_s']:,.0f} "
            f"| {each['speedup']:.2f}x ({low:.2f} to {high:.2f}) | 1/{each['macs_ratio']:.2f} |"
        )
    lines += ["", *(f"* Not measured: {reason}" for reason in found["missing"])]
    return "\n".join(lines).rstrip() + "\n"


def mode_text(each: dict[str, Any]) -> str:
    """Return a mode as a person says it."""
    parts = [each["provider"]]
    if each["provider"] == "cuda":
        parts += [each["cuda_layout"].upper(), "TF32" if each["tf32"] else "float32"]
    if each["provider"] == "tensorrt":
        parts.append("float16" if each["fp16"] else "float32")
    return ", ".join(parts + ["graph"] * bool(each.get("cuda_graph")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--providers", default="cuda,tensorrt", help="default: cuda,tensorrt; cpu tries the script")
    parser.add_argument("--batch-size", default="1,32,256")
    parser.add_argument("--min-time", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="write the figures to OUT.md and OUT.json as well")
    options = parser.parse_args()
    found: dict[str, Any] = {"rows": [], "missing": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {model: slimmed(model, folder) for model in options.models or exported(folder)}
        for provider in options.providers.split(","):
            for model, mode in itertools.product(models, MODES[provider]):
                what = f"{model.stem}, {mode_text({'provider': provider, **mode})}"
                print(what, file=sys.stderr)
                cache = {"engine_cache": folder / "engines"} if provider == "tensorrt" else {}
                config = EvalConfig(
                    model=models[model], baseline=model, provider=provider, **mode, **cache,
                    batch_size=[size.strip() for size in options.batch_size.split(",")], min_time=options.min_time,
                )  # fmt: skip
                try:
                    result = evaluate(config)
                except PruneOnnxError as error:
                    found["missing"].append(f"{what}: {error}")
                    continue
                found["environment"] = result.environment
                found["rows"] += row(model, provider, mode, result)
    if not found["rows"]:
        sys.exit("nothing could be measured:\n" + "\n".join(found["missing"]))
    found["environment"]["argv"] = ["benchmarks/gpu.py", *(model.name for model in options.models)]
    print(markdown(found))
    if options.out:
        write_text(options.out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
        write_text(options.out.with_suffix(".md"), markdown(found))


if __name__ == "__main__":
    main()
