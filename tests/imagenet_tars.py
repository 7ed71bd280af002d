"""Small tars in ImageNet's official layout, so that the real tfds `imagenet2012` builder runs offline.

As a program: `python tests/imagenet_tars.py FOLDER [IMAGES_PER_CLASS] [VALIDATION_IMAGES]`.
"""

import io
from pathlib import Path
import sys
import tarfile

import numpy as np
from PIL import Image

SYNSETS = ('n01440764', 'n01443537', 'n01484850', 'n01491361')


def jpeg_bytes(rng: np.random.Generator) -> bytes:
  """A JPEG of a smooth random picture, between 60 and 160 px on each side."""
  width, height = rng.integers(60, 161, size=2)
  picture = Image.fromarray(rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)).resize((width, height))
  buffer = io.BytesIO()
  picture.save(buffer, 'JPEG', quality=90)
  return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
  entry = tarfile.TarInfo(name)
  entry.size = len(content)
  tar.addfile(entry, io.BytesIO(content))


def write_imagenet_tars(
  folder: Path, images_per_class: int = 8, num_validation: int = 10, seed: int = 0, first_validation: int = 1
) -> dict[str, bytes]:
  """Writes `ILSVRC2012_img_train.tar` (a tar per class inside) and `ILSVRC2012_img_val.tar` into `folder`.

  Returns the JPEGs by name.
  """
  rng = np.random.default_rng(seed)
  images = {}
  folder.mkdir(parents=True, exist_ok=True)
  with tarfile.open(folder / 'ILSVRC2012_img_train.tar', 'w') as train:
    for synset in SYNSETS:
      buffer = io.BytesIO()
      with tarfile.open(fileobj=buffer, mode='w') as class_tar:
        for i in range(images_per_class):
          name = f'{synset}_{i}.JPEG'
          images[name] = jpeg_bytes(rng)
          _add(class_tar, name, images[name])
      _add(train, f'{synset}.tar', buffer.getvalue())
  with tarfile.open(folder / 'ILSVRC2012_img_val.tar', 'w') as validation:
    for i in range(first_validation, first_validation + num_validation):
      name = f'ILSVRC2012_val_{i:08d}.JPEG'
      images[name] = jpeg_bytes(rng)
      _add(validation, name, images[name])
  return images


if __name__ == '__main__':
  write_imagenet_tars(Path(sys.argv[1]), *map(int, sys.argv[2:]))
