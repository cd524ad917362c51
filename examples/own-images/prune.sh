#!/usr/bin/env bash
# A network and a folder of pictures, made here; then what one does with one's own.
#
#     examples/own-images/prune.sh OUT_DIR
set -euo pipefail
out=$1
python "$(dirname "$0")/make_images.py" "$out/images"
prune-onnx train --model bn-cnn --dataset digits --method plain --epochs 4 -o "$out/train"
prune-onnx slim "$out/train/model.onnx" "$out/slim.onnx" --keep-macs 0.5 --calibration "$out/images/train"
prune-onnx eval "$out/slim.onnx" --baseline "$out/train/model.onnx" --data "$out/images/test" \
    --threads 1 --min-time "${MIN_TIME:-2}" --max-accuracy-drop 5pp --report "$out/eval.json"
