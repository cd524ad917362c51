"""What the methods' papers publish beside what this program measures: a sub-command a paper, and NNrelief has two. (The
fifth of the papers, a survey of pruning, publishes no measurements.)

    python benchmarks/papers.py nnrelief DATA_DIR [--networks lenet300 lenet5] [--epochs 60] [--seeds 0 1 2] [--resume]
    python benchmarks/papers.py frank-wolfe DATA_DIR [--pretrain 1 10] [--retrain 5] [--seeds 0 1 2] [--resume]
    python benchmarks/papers.py proximal-ns|hsq|nnrelief-cifar DATA_DIR [--run] [--only WORD ...] [--seeds 0]
                                [--device cuda] [--runs DIR] [--resume]

The page goes to benchmarks/results/papers-<sub-command>.md, its rows, stored as soon as they are measured, to .json
beside it; --resume keeps the rows whose commands are the same. With --runs, the folders of the runs are kept there, and
a run that was interrupted goes on where it was. The last three train networks that take hours on a GPU: without --run
they print what is published, what was measured, and the commands that measure the rest.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from functools import partial
from pathlib import Path

import papers_claims
import papers_frank_wolfe
import papers_nnrelief
import papers_stages

PAPERS = {
    "proximal-ns": (papers_claims.PROXIMAL, "Tables 1 to 3 and the cost of an epoch"),
    "hsq": (papers_claims.HSQ, "filters chosen under hierarchical group sparsity"),
    "nnrelief-cifar": (papers_claims.RELIEF, "VGG and ResNet"),
}


def told(options: argparse.Namespace, arguments: list[str]) -> str:
    """Return the command as a page says it, without this machine's folders."""
    words = ["DATA_DIR" if word == str(options.data_dir) else word for word in arguments]
    for flag in ("--out", "--runs"):
        if flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    return shlex.join(["python", "benchmarks/papers.py", *(word for word in words if word != "--resume")])


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="paper", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("data_dir", type=Path)
    shared.add_argument("--out", type=Path, help="default: benchmarks/results/papers-<sub-command>")
    shared.add_argument("--runs", type=Path, help="keep the runs in this folder, and go on with those that are there")
    shared.add_argument("--resume", action="store_true", help="keep the rows that the page has")
    shared.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    shared.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    shared.add_argument("--images", type=int, help="training images; default: all")

    nnrelief = commands.add_parser("nnrelief", parents=[shared], help="Tables 1, 6 and 7: LeNets on MNIST")
    nnrelief.add_argument("--networks", nargs="+", choices=papers_nnrelief.PUBLISHED, default=["lenet300", "lenet5"])
    nnrelief.add_argument("--epochs", type=int, default=60, help="of the training and of each retraining; 60")
    nnrelief.add_argument("--rounds", type=int, help="prunings; default: the paper's to its result, 11 and 20")
    nnrelief.set_defaults(make=papers_nnrelief.make)

    frank_wolfe = commands.add_parser("frank-wolfe", parents=[shared], help="Figure 1: a small CNN on MNIST")
    frank_wolfe.add_argument("--pretrain", type=int, nargs="+", default=[1, 10], help="epochs before pruning; 1 10")
    frank_wolfe.add_argument("--retrain", type=int, default=5, help="epochs after, and rounds with momentum; 5")
    frank_wolfe.add_argument("--ratios", type=float, nargs="+", default=[0.5], help="weights that go; 0.5")
    frank_wolfe.set_defaults(make=papers_frank_wolfe.make)

    for name, (paper, summary) in PAPERS.items():
        command = commands.add_parser(name, parents=[shared], help=summary)
        command.add_argument("--run", action="store_true", help="measure the rows that are not there yet")
        command.add_argument("--only", nargs="+", metavar="WORD", help="rows whose first columns have all these words")
        command.add_argument("--epochs", type=int, help="of every training, to try the script")
        command.add_argument("--width", type=float, default=1.0, help="of every network, to try the script")
        command.set_defaults(make=partial(papers_stages.make, paper), seeds=[0])

    options = parser.parse_args(arguments)
    options.command = told(options, arguments)
    with tempfile.TemporaryDirectory() as folder:
        options.runs = options.runs or Path(folder)
        options.make(options)


if __name__ == "__main__":
    main()
