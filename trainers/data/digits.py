"""Real handwritten digits, 1797 images of 8x8, that come with scikit-learn: nothing to download.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998), its test part.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.graph_ops.progress import Progress

from .base import Dataset

TEST_SHARE = 0.25


class Digits:
    """The reader."""

    summary = "Digits: 1797 handwritten digits of 8x8, grey, that come with scikit-learn (UCI 1998)."

    def __call__(self, data_dir: Path, fetch: bool, progress: Progress) -> Dataset:
        """Read the data set; see :func:`.load_dataset`. It lies in scikit-learn's package, so the folder plays no part.

        The split is ours and never changes: a quarter of each class is the test part, the rest is for training.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                f"data set 'digits' comes with scikit-learn, which cannot be imported ({error}). "
                "Run: pip install 'prune-onnx[digits]'"
            ) from error
        pixels, labels = load_digits(return_X_y=True)
        # Pixels are 0 to 16.
        images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
        labels = labels.astype(np.int64)
        test = _test_part(labels)
        return Dataset(
            name="digits",
            train_images=images[~test],
            train_labels=labels[~test],
            test_images=images[test],
            test_labels=labels[test],
            num_classes=10,
            mean=(0.3063,),
            std=(0.3766,),
            class_names=tuple("0123456789"),
            augment="shift",
        )


def _test_part(labels: np.ndarray) -> np.ndarray:
    """Return which images are for the test, bool of shape (N,)."""
    draws = np.random.RandomState(0)  # its stream is frozen for ever, unlike that of the newer generators
    test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = draws.permutation(np.flatnonzero(labels == label))
        test[members[: round(TEST_SHARE * len(members))]] = True
    return test


DIGITS = Digits()
