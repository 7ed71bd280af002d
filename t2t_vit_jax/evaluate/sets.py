"""The sets of labelled images that weights are evaluated on: ImageNet, its relatives, any tfds dataset, any folder."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import json
import os
from pathlib import Path
import re
from typing import Any

from t2t_vit_jax.data.class_names import comparable, imagenet_names, imagenet_subset, labels_by_name
from t2t_vit_jax.data.decoding import ORIENTATIONS
from t2t_vit_jax.data.sources import (
  MAX_LABELS,
  SPLIT_FOLDERS,
  Record,
  Records,
  Source,
  checksum,
  local_folder,
  open_classes,
  open_folder,
  prepare_command,
  several_labels,
)
from t2t_vit_jax.errors import DataError, UserError

REAL_LABELS = 'real.json'  # of https://github.com/google-research/reassessed-imagenet
SEVERITIES = range(1, 6)
# The 15 corruptions of ImageNet-C (Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261), and AlexNet's error on each,
# the mean of the five severities: as published at https://github.com/hendrycks/robustness and repeated in
# https://github.com/google-research/augmix/blob/master/imagenet.py.
ALEXNET_ERRORS = {
  'gaussian_noise': 0.886428,
  'shot_noise': 0.894468,
  'impulse_noise': 0.922640,
  'defocus_blur': 0.819880,
  'glass_blur': 0.826268,
  'motion_blur': 0.785948,
  'zoom_blur': 0.798360,
  'snow': 0.866816,
  'frost': 0.826572,
  'fog': 0.819324,
  'brightness': 0.564592,
  'contrast': 0.853204,
  'elastic_transform': 0.646056,
  'pixelate': 0.717840,
  'jpeg_compression': 0.606500,
}


@dataclasses.dataclass(frozen=True)
class Definition:
  """A set of images for classifiers of ImageNet's 1,000 classes, or of some of them."""

  tfds: str  # dataset, with its config
  split: str
  folders: tuple[str, ...]  # where its unpacked archive may lie below the data folder, as FOLDER/CLASS/IMAGE
  subset: str | None = None  # name of the classes that are scored, see `imagenet_subset`; None for all
  corruption: tuple[str, int] | None = None  # name and severity, of a part of ImageNet-C
  is_cropped: bool = False  # whether its images are the centre of a picture already


def _corrupted(corruption: str, severity: int) -> Definition:
  folder = f'{corruption}/{severity}'
  config = f'imagenet2012_corrupted/{corruption}_{severity}'
  return Definition(config, 'validation', (f'imagenet-c/{folder}', folder), None, (corruption, severity), True)


_VALIDATION = ('val', 'validation', 'imagenet/val')
SETS = {
  'val': Definition('imagenet2012', 'validation', _VALIDATION),
  'real': Definition('imagenet2012_real', 'validation', _VALIDATION),  # a folder needs `REAL_LABELS` too
  'v2': Definition('imagenet_v2/matched-frequency', 'test', ('imagenetv2-matched-frequency-format-val',)),
  'v2-threshold': Definition('imagenet_v2/threshold-0.7', 'test', ('imagenetv2-threshold0.7-format-val',)),
  'v2-top': Definition('imagenet_v2/topimages', 'test', ('imagenetv2-top-images-format-val',)),
  'a': Definition('imagenet_a', 'test', ('imagenet-a',), subset='a'),
  'r': Definition('imagenet_r', 'test', ('imagenet-r',), subset='r'),
  'sketch': Definition('imagenet_sketch', 'test', ('sketch', 'imagenet-sketch')),
  **{f'c/{name}/{severity}': _corrupted(name, severity) for name in ALEXNET_ERRORS for severity in SEVERITIES},
}
NAMES = [*(name for name in SETS if '/' not in name), 'c']  # that people type most


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """A set of labelled images, with its own labels.

  Attributes:
    name: what the user calls it.
    source: the images.
    version: the tfds dataset with config, version and split; or the path of the folder.
    expected: names of the classes that it should have; None for all of the model.
    subset: names of the classes that are scored; None for all of the model.
    corruption: name and severity, of a part of ImageNet-C.
    is_cropped: whether its images are the centre of a picture already: they are resized, not cropped again.
    turned: whether images are turned as their EXIF data says; None for what the weights were trained with.
  """

  name: str
  source: Source
  version: str
  expected: tuple[str, ...] | None = None
  subset: tuple[str, ...] | None = None
  corruption: tuple[str, int] | None = None
  is_cropped: bool = False
  turned: bool | None = False

  @functools.cached_property
  def fingerprint(self) -> str:
    """Checksum of the images' files, see `Source.fingerprint`: looked up once for all weights."""
    return self.source.fingerprint()

  def upright(self, data: Mapping[str, Any]) -> bool:
    """Whether images are turned; `data` are the fields of the weights that say how images are prepared."""
    return ORIENTATIONS[data.get('orientation', 'upright')] if self.turned is None else self.turned

  def for_model(
    self, class_names: Sequence[str] | None, num_classes: int, *, allow_missing: bool = False
  ) -> tuple[Source, tuple[int, ...] | None]:
    """The images with the labels of a model's classes, and the labels of the classes that are scored, None for all.

    Args:
      class_names: of the model; None if nobody knows them.
      num_classes: of the model.
      allow_missing: whether some of the expected classes may be missing.

    Raises:
      UserError: the model has other classes; the message names some.
    """
    source = self.source.for_model(class_names, num_classes)
    expected = self.expected or source.class_names
    present = set(comparable(self.source.class_names))
    missing = [name for name, key in zip(expected, comparable(expected), strict=True) if key not in present]
    if missing and not allow_missing:
      raise UserError(
        f'{self.source.description} lacks {len(missing)} of the {len(expected)} classes, such as {missing[0]}; '
        '--allow_missing_classes evaluates those that it has'
      )
    if self.subset is None:
      return source, None
    return source, tuple(sorted(labels_by_name(self.subset, source.class_names, self.name)))


def expand(texts: Iterable[str]) -> list[str]:
  """Names of single sets, each once, in texts such as 'val,a'.

  `c` stands for all of ImageNet-C, and c/CORRUPTION for its five severities.

  Datasets of tfds that belong to a set become that set, since it has rules of its own; hyphens do for underscores.
  """
  found: list[str] = []
  of_tfds = {definition.tfds.replace('-', '_'): name for name, definition in SETS.items()} | {'imagenet_v2': 'v2'}
  for name in filter(None, ','.join(texts).split(',')):
    name = of_tfds.get(name.replace('-', '_'), name)
    parts = [key for key in SETS if key.startswith(f'{name}/')]
    found += parts or [name]
  return list(dict.fromkeys(found))


def open_set(name: str, data_dir: str | None = None, orientation: str | None = None) -> ImageSet:
  """Opens a set of `SETS`, or a tfds dataset as NAME or NAME:SPLIT.

  A set of `SETS` is read from the tfds dataset if that is prepared, else from the folder of its unpacked archive.

  Args:
    name: of the set.
    data_dir: folder of the prepared tfds datasets and of the unpacked archives; None for tfds's own default.
    orientation: 'upright' or 'ignored', EXIF's; None for 'ignored', as published accuracies are measured.

  Raises:
    UserError: there is no such set, or its images are missing; the message has the command that prepares them.
  """
  found = _open_imagenet(name, SETS[name], _root(data_dir)) if name in SETS else _open_dataset(name, data_dir)
  return dataclasses.replace(found, turned=ORIENTATIONS[orientation or 'ignored'])


def open_folder_set(folder: str, orientation: str | None = None) -> ImageSet:
  """Opens the images of FOLDER/CLASS/IMAGE.

  Args:
    folder: the folder of the classes.
    orientation: 'upright' or 'ignored', EXIF's; None for what the weights were trained with, else 'upright'.

  Raises:
    UserError: there is no such folder, or it has no classes or no images.
  """
  path = Path(os.path.expanduser(folder))
  return ImageSet(folder, open_classes(path), str(path.absolute()), turned=_turned(orientation))


def _turned(orientation: str | None) -> bool | None:
  return None if orientation is None else ORIENTATIONS[orientation]


def open_splits(name: str, data_dir: str | None = None, orientation: str | None = None) -> tuple[Source, ImageSet]:
  """Opens the training images and the evaluation images of `val` or of a tfds dataset, NAME or NAME:SPLIT.

  Args:
    name: of the set.
    data_dir: see `open_set`.
    orientation: see `open_set`.

  Raises:
    UserError: there are no such images, or images for evaluation alone.
  """
  if name in SETS and name != 'val':
    raise UserError(f'{name} has no training images: --probe takes val, datasets of tfds and folders')
  test = open_set(name, data_dir, orientation)
  if name == 'val' and not _prepared_version(SETS[name].tfds, _root(data_dir)):
    return open_folder(_root(data_dir), 'train'), test
  from t2t_vit_jax.data.tfds_source import open_tfds  # late: folders need no tfds

  if name != 'val':
    return open_tfds(name.partition(':')[0], 'train', data_dir), test
  return open_tfds(SETS[name].tfds, 'train', str(_root(data_dir))), test


def open_folder_splits(folder: str, orientation: str | None = None) -> tuple[Source, ImageSet]:
  """Opens FOLDER/train/CLASS/IMAGE, and FOLDER/validation (also val or valid), or FOLDER/test.

  Args:
    folder: of the two.
    orientation: see `open_folder_set`.

  Raises:
    UserError: there are no such folders, or they have different classes.
  """
  path = Path(os.path.expanduser(folder))
  train = open_folder(path, 'train')
  names = (name for name in (*SPLIT_FOLDERS['validation'], 'test') if (path / name).is_dir())
  test = open_folder(path, next(names, 'validation'), train.class_names)
  return train, ImageSet(folder, test, str(path.absolute()), turned=_turned(orientation))


def _open_imagenet(name: str, definition: Definition, root: Path) -> ImageSet:
  source, version = _find_images(name, definition, root)
  subset = None if definition.subset is None else imagenet_subset(definition.subset)
  expected, corruption = subset or tuple(imagenet_names()), definition.corruption
  return ImageSet(name, source, version, expected, subset, corruption, definition.is_cropped)


def _find_images(name: str, definition: Definition, root: Path) -> tuple[Source, str]:
  """The images of a set of ImageNet's family, and what they are: the tfds dataset and its version, or the folder."""
  if (version := _prepared_version(definition.tfds, root)) is not None:
    from t2t_vit_jax.data.tfds_source import open_tfds  # late: archives need no tfds

    return open_tfds(definition.tfds, definition.split, str(root)), f'{version} {definition.split}'
  if name == 'real':
    if (root / REAL_LABELS).is_file():
      validation, version = _find_images('val', SETS['val'], root)
      return _reassessed(validation, root / REAL_LABELS), f'{version}, {REAL_LABELS}'
    advice = f'put {REAL_LABELS} of https://github.com/google-research/reassessed-imagenet into {root}, beside val'
  else:
    for folder in definition.folders:
      if (root / folder).is_dir():
        return _named_by_ids(open_classes(root / folder)), str(root / folder)
    advice = f'unpack its archive as {root / definition.folders[0]}/CLASS/IMAGE'
  raise UserError(f'{name} is not in {root}: {advice}, or prepare it with: {prepare_command(definition.tfds, root)}')


def _root(data_dir: str | None) -> Path:
  return Path(local_folder(data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'))


def _prepared_version(dataset: str, root: Path) -> str | None:
  """Name of a tfds dataset with config and version, such as 'imagenet_a/0.1.0'; None if it is not prepared."""
  if not (root / dataset).is_dir():
    return None
  from t2t_vit_jax.data.tfds_source import open_builder  # late: archives need no tfds

  builder = open_builder(dataset, str(root))
  return str(builder.info.full_name) if builder.info.splits else None


def _named_by_ids(source: Source) -> Source:
  """The same images where classes are the numbers of ImageNet's 1,000, as in ImageNet-V2's archives, by their ids."""
  ids = list(imagenet_names())
  if not all(re.fullmatch(r'\d{1,3}', name) for name in source.class_names):
    return source
  return dataclasses.replace(source, class_names=tuple(ids[int(name)] for name in source.class_names))


@dataclasses.dataclass(frozen=True)
class _Reassessed:
  """ImageNet's validation images with other labels, by the number in the name of each."""

  records: Records
  labels: tuple[tuple[int, ...], ...]

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> Record:
    record = self.records[index]
    number = re.search(r'ILSVRC2012_val_(\d{8})\.', record.id)
    if number is None:
      raise DataError(f'{record.id} is not named like ILSVRC2012_val_00000001.JPEG, so its labels cannot be found')
    if not 1 <= int(number[1]) <= len(self.labels):
      raise DataError(f'{REAL_LABELS} has labels for {len(self.labels):,} images, and none for {record.id}')
    return record._replace(label=several_labels(self.labels[int(number[1]) - 1], record.id))

  def fingerprint(self) -> str:
    """See `Records`."""
    return checksum([(self.records.fingerprint(), self.labels)])


def _reassessed(validation: Source, file: Path) -> Source:
  """ImageNet's validation images with the labels of ReaL, a list of labels for each image in the order of their names.

  Raises:
    UserError: the file does not hold such a list.
  """
  ids = tuple(imagenet_names())
  try:
    labels = json.loads(file.read_text('utf-8'))
    if not all(type(label) is int and 0 <= label < len(ids) for each in labels for label in each):
      raise ValueError
  except (OSError, ValueError, TypeError, RecursionError) as error:
    raise UserError(f'{file} cannot be read as ReaL labels: a list of labels for each image is expected') from error
  source = validation.with_classes(ids)
  return dataclasses.replace(
    source,
    records=_Reassessed(source.records, tuple(map(tuple, labels))),
    num_labels=MAX_LABELS,
    description=f'{source.description} with {file}',
  )


def _open_dataset(name: str, data_dir: str | None) -> ImageSet:
  """Opens NAME or NAME:SPLIT of tfds."""
  from t2t_vit_jax.data.tfds_source import open_builder, open_tfds  # late: folders need no tfds

  dataset, _, split = name.partition(':')
  try:
    builder = open_builder(dataset, data_dir)
  except UserError as error:
    raise UserError(f'{error}; sets are {", ".join(NAMES)} and the datasets of tfds') from error
  names = list(builder.info.splits or ('test',))  # of a dataset that is not prepared, opening it says how to do that
  candidates = [split] if split else [known for known in ('validation', 'test') if known in names]
  if len(candidates) != 1:
    raise UserError(f'which images of {dataset}? It has {", ".join(names)}: write {dataset}:SPLIT')
  source = open_tfds(dataset, candidates[0], data_dir)
  return ImageSet(name, source, f'{builder.info.full_name} {candidates[0]}')
