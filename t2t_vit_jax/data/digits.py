"""scikit-learn's handwritten digits as a tfds dataset: real images that need no download."""

from collections.abc import Iterator
import io
from typing import Any

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

NUM_TEST_IMAGES = 360


class Digits(tfds.core.GeneratorBasedBuilder):
  """1,797 grey images of 8 x 8 px in ten classes, split 1,437 / 360 with the classes' shares kept.

  The split is part of the dataset's version: it never changes under the same version number.
  scikit-learn is imported only to prepare the files: reading them, in each worker, does not need it.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Stratified split, random state 0.'}
  name = 'digits'

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description='Optical recognition of handwritten digits (Alpaydin and Kaynak, UCI 1998), as in scikit-learn.',
      homepage='https://scikit-learn.org/stable/datasets/toy_dataset.html#digits-dataset',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
          'label': tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
          'file_name': tfds.features.Text(),
        }
      ),
      supervised_keys=('image', 'label'),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    del dl_manager  # the images come with scikit-learn
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    labels = load_digits().target
    train, test = train_test_split(np.arange(len(labels)), test_size=NUM_TEST_IMAGES, stratify=labels, random_state=0)
    return {'train': self._generate_examples(train), 'test': self._generate_examples(test)}

  def _generate_examples(self, indices: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index in sorted(indices.tolist()):
      pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
      # tfds encodes arrays with TensorFlow, but takes a file's bytes as they are.
      png = io.BytesIO()
      Image.fromarray(pixels).save(png, 'PNG')
      png.seek(0)
      name = f'digit_{index:04d}'
      yield name, {'image': png, 'label': int(digits.target[index]), 'file_name': f'{name}.png'}
