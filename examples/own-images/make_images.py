"""Writes handwritten digits as PNG files: OUT/train/3/0017.png and OUT/test/3/0005.png, one sub-folder a class.

python examples/own-images/make_images.py OUT
"""

import sys
from pathlib import Path

from PIL import Image

from prune_onnx.trainers.data import load_dataset


def main(out: Path) -> None:
    """Write both parts of the data set."""
    digits = load_dataset("digits")
    parts = {"train": (digits.train_images, digits.train_labels), "test": (digits.test_images, digits.test_labels)}
    for part, (images, labels) in parts.items():
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = out / part / str(label) / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0]).save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
