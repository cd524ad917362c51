#!/usr/bin/env bash
# The two sessions that the README shows: prints every command and its real output.
#
#     benchmarks/show.sh DATA_DIR MODEL_DIR > benchmarks/results/show.txt
#
# DATA_DIR has MNIST/raw and cifar-10-batches-bin, MODEL_DIR has resnet20-cifar10.onnx (CIFAR-10, top-1 91.73 %).
set -euo pipefail
data=$1 models=$2
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export PRUNE_ONNX_DATA=$data COLUMNS=100

show() {
    echo "\$ $*" | sed "s#$out/##g; s#$models/##g"
    "$@" 2>&1 | sed "s#$out/##g; s#$models/##g"
    echo
}

date -u +%Y-%m-%d
uname -m; grep -m1 "model name" /proc/cpuinfo || true
nproc
pip list 2>/dev/null | grep -iE "^(torch|onnx|onnxruntime|onnxruntime-gpu|numpy|prune-onnx) " || true
echo

show prune-onnx train --model lenet5-bn --dataset mnist --method proximal-ns --epochs 4 --augment none -o "$out/lenet"
show prune-onnx slim "$out/lenet/model.onnx" "$out/lenet-slim.onnx"
show prune-onnx eval "$out/lenet-slim.onnx" --baseline "$out/lenet/model.onnx" --dataset mnist

# The same budget, first by weight norms alone, then with 1,024 unlabelled training images.
show prune-onnx slim "$models/resnet20-cifar10.onnx" "$out/resnet20-l2.onnx" --keep-macs 0.7 --criterion l2
show prune-onnx eval "$out/resnet20-l2.onnx" --baseline "$models/resnet20-cifar10.onnx" --dataset cifar10 \
    --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
show prune-onnx slim "$models/resnet20-cifar10.onnx" "$out/resnet20-slim.onnx" --keep-macs 0.7 \
    --calibration cifar10 --calibration-size 1024 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
show prune-onnx eval "$out/resnet20-slim.onnx" --baseline "$models/resnet20-cifar10.onnx" --dataset cifar10 \
    --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
