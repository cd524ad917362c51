#!/usr/bin/env bash
# Prunes the UltraFace detector, a file from elsewhere, and times it beside the original.
#
#     examples/detector/prune.sh MODEL.onnx OUT_DIR [PICTURES_DIR]
set -euo pipefail
model=$1 out=$2 pictures=${3:-}
if [ ! -f "$model" ]; then
    echo "$model is not there. See examples/detector/README.md for where the file comes from." >&2
    exit 1
fi
mkdir -p "$out"
calibration=()
if [ -n "$pictures" ]; then
    # The network wants (pixel - 127) / 128; --mean and --std are of pixel / 255.
    calibration=(--calibration "$pictures" --calibration-size 64 --size 240,320)
    calibration+=(--mean 0.498,0.498,0.498 --std 0.502,0.502,0.502)
fi
prune-onnx slim "$model" "$out/slim.onnx" --keep-macs 0.7 --report "$out/slim.json" "${calibration[@]}"
prune-onnx eval "$out/slim.onnx" --baseline "$model" --threads 1 --min-time "${MIN_TIME:-2}" --report "$out/eval.json"
