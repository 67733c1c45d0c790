"""TFDS builder of scikit-learn's handwritten digits: 1,797 real 8 x 8 images with captions."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def caption(label: int) -> str:
    """The caption of a digit, for instance "a handwritten digit seven"."""
    return f"a handwritten digit {NAMES[label]}"


CAPTIONS = tuple(map(caption, range(len(NAMES))))


class Digits(tfds.core.GeneratorBasedBuilder):
    """The digits as 8-bit grey PNG (grey level 16 of the original becomes 255), in the original order."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8, encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=list(NAMES)),
                }
            ),
            description="Optical recognition of handwritten digits (UCI), as shipped with scikit-learn.",
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
            supervised_keys=None,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image
        from sklearn.datasets import load_digits

        bunch = load_digits()
        for i, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
            image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8), mode="L")
            yield i, {"image": image, "caption": caption(int(label)), "label": int(label)}
