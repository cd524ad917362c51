#!/usr/bin/env bash
# What pipeline.toml does, as single commands. PRUNE_ONNX_DATA names the folder with FashionMNIST/raw, else it is "data".
#
#     examples/fashion-mnist/steps.sh OUT_DIR
set -euo pipefail
out=$1
prune-onnx train --model lenet5-bn --dataset fashion-mnist --method proximal-ns --epochs 10 --augment none --download -o "$out/train"
prune-onnx slim "$out/train/model.onnx" "$out/exact.onnx"
prune-onnx slim "$out/exact.onnx" "$out/slim.onnx" --keep-macs 0.7 --calibration fashion-mnist --calibration-size 1024
prune-onnx eval "$out/slim.onnx" --baseline "$out/train/model.onnx" --dataset fashion-mnist --max-accuracy-drop 1pp --html "$out/report.html"
