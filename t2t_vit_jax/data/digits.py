"""Handwritten digits that come with this package: real images that need no download, and no library to read them."""

import dataclasses
import functools
from importlib import resources
import io

import numpy as np
from PIL import Image

from t2t_vit_jax.data.sources import Record, Source, checksum
from t2t_vit_jax.errors import UserError, did_you_mean

NAME = 'digits'  # as `data.name`
SPLITS = ('train', 'test')
CLASS_NAMES = tuple('0123456789')
VALUES = '0123456789abcdefg'  # the signs of the grey values 0 to 16


def open_digits(split: str) -> Source:
  """Opens 1,437 digits for training, 'train', or 360 for evaluation, 'test': grey images of 8 x 8 px in ten classes.

  Raises:
    UserError: there is no such split.
  """
  if split not in SPLITS:
    raise UserError(f'digits has no split {split!r}: {did_you_mean(split, SPLITS)}')
  return Source(_DigitRecords(split), CLASS_NAMES, f'digits {split}')


@dataclasses.dataclass(frozen=True)
class _DigitRecords:
  """The digits of a split; workers get its name alone, and read the file again."""

  split: str

  def __len__(self) -> int:
    return len(digits(self.split))

  def __getitem__(self, index: int) -> Record:
    return digits(self.split)[index]

  def fingerprint(self) -> str:
    """See `Records`: here of the images themselves."""
    return checksum(_rows(self.split))


@functools.cache
def digits(split: str) -> tuple[Record, ...]:
  """The records of a split, whose images are PNG files."""
  return tuple(Record(_as_png(values), int(label), name) for name, label, values in _rows(split))


@functools.cache
def _rows(split: str) -> tuple[tuple[str, ...], ...]:
  """Name, label and grey values of each digit of a split; `digits.tsv` has their source."""
  lines = (resources.files('t2t_vit_jax.data') / 'digits.tsv').read_text(encoding='utf-8').splitlines()
  rows = (line.split('\t') for line in lines if not line.startswith('#'))
  return tuple((f'digit_{number:04d}.png', *row[1:]) for number, row in enumerate(rows) if row[0] == split)


def _as_png(values: str) -> bytes:
  pixels = np.array([VALUES.index(sign) for sign in values]).reshape(8, 8) * (255 / 16)
  file = io.BytesIO()
  Image.fromarray(np.round(pixels).astype(np.uint8)).save(file, 'PNG')
  return file.getvalue()
