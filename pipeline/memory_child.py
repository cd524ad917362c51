"""The process in which :mod:`.memory` measures: it imports next to nothing, opens one model, runs it, and tells.

    python -m prune_onnx.pipeline.memory_child OPTIONS < FEED.npz

``OPTIONS`` is a JSON object: ``model``, ``provider`` and its ``options`` by ONNX Runtime's names, ``threads``, and the
``entries`` of the session's configuration. The inputs come as an ``.npz`` archive; the answer is a JSON object with
``host`` and ``device``, see :class:`.memory.PeakMemory`.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout, suppress
from typing import Any

# The second run finds the memory that the first one left.
RUNS = 2


def main() -> None:
    """Measure what the command line names."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    import numpy as np
    import onnxruntime as ort

    from .gpu import device_memory

    on_device = options["provider"] != "CPUExecutionProvider"
    with np.load(io.BytesIO(sys.stdin.buffer.read())) as arrays:
        feed = {name: arrays[name] for name in arrays.files}
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 4
    session_options.intra_op_num_threads = options["threads"] or 0
    for key, value in options["entries"].items():
        session_options.add_session_config_entry(key, value)
    if on_device:
        with redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    device = device_memory() if on_device else None
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    host = status("VmRSS")
    session = ort.InferenceSession(
        options["model"], session_options, providers=[(options["provider"], options["options"])], enable_fallback=0
    )
    for _ in range(RUNS):
        session.run(None, feed)
    after = device_memory() if device is not None else None
    found = {"host": status("VmHWM") - host, "device": None if device is None or after is None else after - device}
    sys.stdout.write(json.dumps(found))


def status(key: str) -> int:
    """Return bytes that the system tells of this process."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


if __name__ == "__main__":
    main()
