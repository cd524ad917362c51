#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests, then the benchmark. Results go to benchmarks/results/gpu.md
# and gpu.json.
#
#     benchmarks/gpu.sh [MODEL.onnx ...]
#
# PYTHON chooses the interpreter, whose environment needs onnxruntime-gpu, CUDA and cuDNN; nvidia-ml-py adds the driver,
# the clocks and the memory of the device, TensorRT its own rows. Without a GPU it ends with exit code 1 and the reason.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$root/.typing${PYTHONPATH:+:$PYTHONPATH}"
out=$root/benchmarks/results/gpu

"$python" -c '
import sys
import numpy as np
from onnx import parser
from prune_onnx.graph_ops.errors import PruneOnnxError
from prune_onnx.pipeline.sessions import create_session
try:
    create_session(parser.parse_model("""<ir_version: 9, opset_import: ["" : 17]>
        g (float[4] x) => (float[4] y) { y = Relu(x) }"""), "cuda").run(None, {"x": np.zeros(4, np.float32)})
except PruneOnnxError as error:
    sys.exit(f"No GPU to measure on: {error}")
'
"$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -q "$root/tests/gpu" -m gpu
"$python" "$root/benchmarks/gpu.py" "$@" --out "$out"
echo "Written: $out.md and $out.json"
