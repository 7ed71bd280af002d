"""Names and counts images that cannot be read, or not as they are, and ends a run for too many, or a wrong label."""

from collections.abc import Callable, Generator, Iterable

import numpy as np

from t2t_vit_jax.data.decoding import BadImage, Remark
from t2t_vit_jax.data.loader import Batch
from t2t_vit_jax.data.sources import NO_LABEL, Source
from t2t_vit_jax.errors import DataError, UserError, plural

CHOSEN = Remark.NOT_UPRIGHT  # where a config or a flag decides about orientation: no warning is due
SAMPLED = 16  # images that a dry run reads of each split
READABLE_NOW = 'a second try succeeded'
REMEDY = (
  'Replace those that warnings name, or allow a larger share with --config.data.max_bad_fraction; '
  't2t-vit shrink names them too, and copies the others'
)
MAX_NAMED = 20  # images; further ones are only counted
REMARKS = {
  Remark.DEEP: 'has more than 8 bits a sample: they are scaled to 8',
  Remark.TRANSPARENT: 'has a transparency channel: what is transparent is shown on white',
  Remark.NOT_UPRIGHT: 'is stored sideways or mirrored, and its EXIF orientation is ignored',
}


class Remarks:
  """Warns once of each kind of image whose pixels are not used as they are.

  Args:
    wanted: remarks that the user asked for, so that no warning is due.
  """

  def __init__(self, wanted: Remark = Remark.NONE) -> None:
    self._said = wanted

  def note(self, source: Source, batch: Batch, warn: Callable[[str], None]) -> None:
    """Warns of the first image in a batch of `source` that a remark is true of, unless it was said before."""
    for remark, text in REMARKS.items():
      if remark in self._said:
        continue
      indices = batch['index'][(batch['remarks'] & remark) > 0]
      if len(indices):
        self._said |= remark
        warn(f'image {_name(source, int(indices[0]))} {text}; others like it are not named')


def _name(source: Source, index: int) -> str:
  try:
    return source[index].id
  except BadImage:  # it could be read a moment ago
    return f'{index} of {source.description}'


class Faults:
  """Checks batches before they go to the devices.

  Args:
    source: where the batches come from.
    warn: shows a line to the user.
    consequence: what becomes of an image that cannot be read, as that line says it.
    max_bad_fraction: share of the source's images that may be unreadable; one may be, unless it is 0.
    remarks: on images of all sources of a run.
  """

  def __init__(
    self,
    source: Source,
    warn: Callable[[str], None],
    consequence: str,
    max_bad_fraction: float = 1.0,
    remarks: Remarks | None = None,
  ):
    self._source = source
    self._warn = warn
    self._consequence = consequence
    self._max_bad_fraction = max_bad_fraction
    # A share of a small folder may be less than an image.
    self._allowed = max(max_bad_fraction * len(source), 1) if max_bad_fraction else 0
    self._remarks = remarks or Remarks(CHOSEN)
    self._bad: set[int] = set()

  @property
  def num_bad(self) -> int:
    """Unreadable images met so far, each counted once."""
    return len(self._bad)

  def check(self, batches: Iterable[Batch]) -> Generator[Batch]:
    """Passes on what the devices need of each batch: image, label and mask.

    Raises:
      DataError: a label belongs to no class, or too many images cannot be read.
    """
    for batch in batches:
      self._remarks.note(self._source, batch, self._warn)
      indices, bad, _ = batch.pop('index'), batch.pop('bad'), batch.pop('remarks')
      self._check_labels(batch['label'], indices, bad)
      for index in indices[bad].tolist():
        self._count_unreadable(index)
      yield batch

  def _check_labels(self, labels: np.ndarray, indices: np.ndarray, bad: np.ndarray) -> None:
    labels = np.where(bad, 0, labels.T).T  # (B,) or (B, K)
    wrong = (labels >= len(self._source.class_names)) | ((labels < 0) & ((labels != NO_LABEL) | (labels.ndim == 1)))
    if wrong.any():
      row = int(np.nonzero(wrong)[0][0])
      label, example = labels[wrong][0], self._source[int(indices[row])].id
      if label < 0:
        raise DataError(f'{example} has no label ({label}), so {self._source.description} cannot be used')
      raise DataError(
        f'{example} has label {label}, but {self._source.description} has {len(self._source.class_names)} classes, '
        'numbered from 0: prepare the dataset again'
      )

  def _count_unreadable(self, index: int) -> None:
    if index in self._bad:
      return
    self._bad.add(index)
    name, reason = explain(self._source, index)
    if self.num_bad <= MAX_NAMED:
      self._warn(f'image {name} cannot be read ({reason}); {self._consequence}')
    if self.num_bad > self._allowed:
      raise DataError(
        f'{self.num_bad} of the {len(self._source):,} images of {self._source.description} cannot be read, '
        f'more than data.max_bad_fraction = {self._max_bad_fraction:g} allows; the last is {name} ({reason}). {REMEDY}'
      )


def check_sample(source: Source, warn: Callable[[str], None]) -> None:
  """Reads images that are spread over a source, and warns if some cannot be read.

  Raises:
    UserError: none can.
  """
  indices = np.unique(np.linspace(0, len(source) - 1, SAMPLED, dtype=np.int64)).tolist()
  bad = [(name, reason) for name, reason in (explain(source, index) for index in indices) if reason != READABLE_NOW]
  if not bad:
    return
  name, reason = bad[0]
  tried = f'of {plural(len(indices), "image")} of {source.description} that were tried'
  if len(bad) == len(indices):
    raise UserError(f'{tried}, none can be read; the first is {name} ({reason})')
  warn(f'{tried}, {len(bad)} cannot be read; the first is {name} ({reason}). {REMEDY}')


def explain(source: Source, index: int) -> tuple[str, str]:
  """Id of a record that could not be read, and the reason. Workers don't send it: the record is read again."""
  name = f'{index} of {source.description}'
  try:
    record = source[index]
    name = record.id
    source.image_of(record).decode()
  except BadImage as error:
    return name, str(error)
  return name, READABLE_NOW
