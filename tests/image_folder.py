"""Small image folders in PyTorch's layout, and files as they are met in the wild."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from t2t_vit_jax.data.decoding import EncodedImage


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


def decode(file: bytes, *, upright: bool = False) -> Image.Image:
  return EncodedImage(file, upright=upright).decode()


def picture(rng: np.random.Generator) -> Image.Image:
  """A smooth random picture, between 40 and 80 px on each side."""
  width, height = rng.integers(40, 81, size=2)
  return Image.fromarray(rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)).resize((width, height))


def write_image_folder(folder: Path, classes: tuple[str, ...], *, seed: int = 0, **images_per_class: int) -> Path:
  """Writes `folder/<split>/<class>/<number>.JPEG` for each split, such as `train=8, val=2`."""
  rng = np.random.default_rng(seed)
  for split, number in images_per_class.items():
    for name in classes:
      (folder / split / name).mkdir(parents=True)
      for i in range(number):
        (folder / split / name / f'{i}.JPEG').write_bytes(encoded(picture(rng), 'JPEG', quality=90))
  return folder
