"""SIGINT and SIGTERM at many moments of every command: the exit code of the contract, and no partial file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from prune_onnx.pipeline.stamps import Stamp

from ..graph_ops.builder import Net

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / ".typing"), "OMP_NUM_THREADS": "1"}
PROGRAM = [sys.executable, "-c", "from prune_onnx.cli.main import main; main()"]
# Of the time that a command takes when it is left alone. The first moments are the interpreter's own.
MOMENTS = (0.4, 0.6, 0.8)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data for it, and a pipeline file."""
    folder = tmp_path_factory.mktemp("inputs")
    net = Net()
    y = net.input("N", 3, 16, 16)
    for width in (32, 32, 16):
        y = net.relu(net.bn(net.conv(y, width, pads=[1, 1, 1, 1])))
    onnx.save(net.model(net.head(y)), folder / "m.onnx")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 3, 16, 16)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=rng.integers(0, 5, 256))
    (folder / "pipeline.toml").write_text(
        f"output = 'out'\n[slim]\ninput = '{folder}/m.onnx'\nkeep_macs = 0.5\n"
        f"[eval]\ndata = '{folder}/data.npz'\nmin_time = 0.2\nthreads = 1\n"
    )
    return folder


def commands(folder: Path) -> dict[str, list[str]]:
    model, data = str(folder / "m.onnx"), str(folder / "data.npz")
    return {
        "slim": ["slim", model, "out.onnx", "--keep-macs", "0.5", "--calibration", data, "--report", "out.json"],
        "eval": ["eval", model, "--baseline", model, "--data", data, "--min-time", "0.3", "--threads", "1",
                 "--html", "out.html", "--markdown", "out.md", "--report", "out.json"],
        "run": ["run", str(folder / "pipeline.toml")],
    }  # fmt: skip


def interrupted(arguments: list[str], place: Path, seconds: float, number: int) -> tuple[int, str]:
    """Run a command, send it a signal after so many seconds; return the exit code and what it said.

    A signal that comes when all is done and Python puts itself away ends it as a shell counts it: 128 and the number.
    """
    with subprocess.Popen(
        [*PROGRAM, *arguments], cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        time.sleep(seconds)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode, stderr


def check_whole(place: Path) -> None:
    """Every file that is there is complete."""
    for path in (path for path in place.rglob("*") if path.is_file()):
        assert not path.name.startswith("."), f"{path} is left over"
        content = path.read_bytes()
        if path.suffix == ".onnx":
            onnx.checker.check_model(onnx.load(path))
        elif path.suffix == ".html":
            assert content.rstrip().endswith(b"</html>"), path
        elif path.suffix == ".json":
            assert content.rstrip().endswith(b"}"), path


@pytest.mark.parametrize("name", ["slim", "eval", "run"])
def test_a_signal_at_any_moment_ends_a_command_and_leaves_no_partial_file(
    name: str, workplace: Path, tmp_path: Path
) -> None:
    arguments = commands(workplace)[name]
    (tmp_path / "whole").mkdir()
    began = time.perf_counter()
    done = subprocess.run([*PROGRAM, *arguments], cwd=tmp_path / "whole", env=ENVIRONMENT, capture_output=True)
    whole = time.perf_counter() - began
    assert done.returncode in (0, 4), done.stderr
    check_whole(tmp_path / "whole")
    stopped = 0
    for share in MOMENTS:
        number = signal.SIGTERM if share == MOMENTS[1] else signal.SIGINT
        place = tmp_path / f"{share}"
        place.mkdir()
        code, stderr = interrupted(arguments, place, share * whole, number)
        assert "Traceback" not in stderr
        assert code in (0, 4, CODES[signal.Signals(number)]), (share, code, stderr)
        if stderr.endswith(("Terminated.\n", "Interrupted.\n")):
            stopped += 1
            assert code == CODES[signal.Signals(number)]
            assert stderr.endswith("Terminated.\n") == (number == signal.SIGTERM)
        check_whole(place)
    assert stopped, "some moments lie between the beginning and the end"


def test_a_run_that_was_stopped_is_finished_by_the_next_one(workplace: Path, tmp_path: Path) -> None:
    arguments = commands(workplace)["run"]
    interrupted(arguments, tmp_path, 2.0, signal.SIGINT)
    done = subprocess.run([*PROGRAM, *arguments], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode in (0, 4), done.stderr
    stamp = Stamp.read(tmp_path / "out" / "slim")
    assert stamp is not None
    assert stamp.finished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_training_saves_and_ends_with_its_own_code(number: int, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    what = ["--model", "bn-cnn", "--dataset", "digits", "--method", "plain"]
    arguments = ["train", *what, "--epochs", "500", "-o", "run"]
    with subprocess.Popen(
        [*PROGRAM, *arguments], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = [next(process.stderr)]
        while not said[-1].startswith("epoch 1/"):
            said.append(next(process.stderr))
        process.send_signal(number)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == CODES[signal.Signals(number)], (said, rest)
    assert (tmp_path / "run" / "checkpoint.pt").is_file()
    assert not (tmp_path / "run" / "model.onnx").exists()
    check_whole(tmp_path)
