"""Prepared datasets of tfds, read by random access without TensorFlow."""

from collections.abc import Iterator
import contextlib
import dataclasses
import io
import os
from pathlib import Path
import shlex
import sys
from typing import Any

import numpy as np

from t2t_vit_jax.data import digits
from t2t_vit_jax.data.sources import (
  MAX_LABELS,
  Record,
  Source,
  checksum,
  local_folder,
  prepare_command,
  several_labels,
  size_and_time,
)
from t2t_vit_jax.errors import MissingExtraError, UserError, did_you_mean, first_line, require, writing_problem

require('a dataset of tfds', 'tensorflow_datasets')
import tensorflow_datasets as tfds  # noqa: E402 (a line about the extra comes before the traceback)

LABEL_FEATURES = {'imagenet2012_real': 'real_label'}  # of tfds datasets whose label is not called so


class Digits(tfds.core.GeneratorBasedBuilder):
  """The digits of this package as a tfds dataset, which is prepared on first use.

  The split is part of the dataset's version: it never changes under the same version number.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Stratified split, random state 0.'}
  name = digits.NAME

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description='Optical recognition of handwritten digits (Alpaydin and Kaynak, UCI 1998), as in scikit-learn.',
      homepage='https://scikit-learn.org/stable/datasets/toy_dataset.html#digits-dataset',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
          'label': tfds.features.ClassLabel(names=digits.CLASS_NAMES),
          'file_name': tfds.features.Text(),
        }
      ),
      supervised_keys=('image', 'label'),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    del dl_manager  # the images come with this package
    return {split: self._generate_examples(split) for split in digits.SPLITS}

  def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for image, label, name in digits.digits(split):
      # tfds encodes arrays with TensorFlow, but takes a file's bytes as they are.
      yield Path(name).stem, {'image': io.BytesIO(image), 'label': label, 'file_name': name}


@dataclasses.dataclass(frozen=True)
class _TfdsRecords:
  """A tfds data source whose dicts become records."""

  examples: Any
  name: str  # dataset/split
  label: str  # name of the feature
  parts: tuple[Any, ...]  # of the files: tfds's `FileInstruction`s

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> Record:
    example = self.examples[index]
    name = f'{self.name}#{index}' if 'file_name' not in example else example['file_name'].decode()
    label = example[self.label]
    return Record(example['image'], int(label) if np.ndim(label) == 0 else several_labels(label, name), name)

  def fingerprint(self) -> str:
    """See `Records`. Of each file, the range of its examples counts too."""
    files = ((part, Path(part.filename)) for part in self.parts)
    return checksum((file.name, *size_and_time(file), part.skip, part.take) for part, file in files)


def open_tfds(name: str, split: str, data_dir: str | None = None) -> Source:
  """Opens a split of a tfds image-classification dataset prepared as array_record files.

  `digits` is prepared on first use, since its images come with this package.

  Args:
    name: tfds name such as 'imagenet2012', with config and version if wanted.
    split: tfds split expression such as 'train' or 'validation[:100]'.
    data_dir: folder of the prepared data; None for tfds's own default (the environment variable
      TFDS_DATA_DIR, or ~/tensorflow_datasets).

  Raises:
    UserError: unknown name or split, or data not prepared; the message has the command that prepares it.
  """
  builder = open_builder(name, data_dir)
  if isinstance(builder, Digits):
    builder = _prepare_digits(builder)
  command = prepare_command(name, builder.data_dir_root)
  if not builder.info.splits:
    raise UserError(f'{name} is not prepared, {builder.data_path} has no data; prepare it with: {command}')
  class_names, num_labels = image_and_label(builder)
  try:
    records = builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})
  except NotImplementedError as error:
    raise UserError(without_array_record(builder)) from error
  except (ValueError, AssertionError) as error:
    if split in builder.info.splits:
      raise UserError(f'split {split!r} of {name} cannot be read: {first_line(error, kind=False)}') from error
    raise UserError(f'{name} has no split {split!r}: {did_you_mean(split, builder.info.splits)}') from error
  if not len(records):
    raise UserError(f'split {split!r} of {name} is empty')
  parts = tuple(builder.info.splits[split].file_instructions)
  files = [os.fspath(part.filename) for part in parts]
  if missing := [file for file in files if not os.path.isfile(file)]:  # else each of their images would be a bad one
    raise UserError(
      f'{len(missing):,} of {len(files):,} files of {name} are missing, such as {missing[0]}: copy them again, or '
      f'prepare it anew with: {command}'
    )
  return Source(
    _TfdsRecords(records, f'{name}/{split}', label_feature(builder), parts),
    class_names,
    f'{name} {split} ({builder.data_path})',
    num_labels,
  )


def open_builder(name: str, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
  """The tfds builder of `name`, whether its data is prepared or not.

  Raises:
    UserError: tfds has no such dataset (the message names the nearest), or `data_dir` cannot be read.
  """
  folder = data_dir or os.environ.get('TFDS_DATA_DIR')
  data_dir = local_folder(folder) if folder else None
  try:
    if name == Digits.name:
      return Digits(data_dir=data_dir, file_format='array_record')
    return tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False)
    raise UserError(f'tfds has no dataset {name!r}: {did_you_mean(name, known)}') from error
  except ImportError as error:
    raise MissingExtraError(name, 'tensorflow') from error
  except OSError as error:
    raise UserError(f'cannot read {data_dir}: {error.strerror or error}') from error
  except Exception as error:  # no such config or version, damaged metadata: tfds raises errors of many kinds
    raise UserError(f'tfds cannot build {name!r}: {first_line(error, kind=False)}') from error


def _prepare_digits(builder: Digits) -> Digits:
  tfds.disable_progress_bar()  # four bars for half a second's work
  try:
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
      builder.download_and_prepare()  # returns at once where the files exist
    return builder
  except FileExistsError:  # another process was faster
    return Digits(data_dir=builder.data_dir_root, file_format='array_record')
  except OSError as error:
    raise UserError(f'cannot write to {builder.data_path}: {writing_problem(error, builder.data_path)}') from error
  finally:
    tfds.enable_progress_bar()


def without_array_record(builder: tfds.core.DatasetBuilder) -> str:
  """Error message for a dataset that is prepared in a format without random access, such as tfrecord."""
  folder = shlex.quote(builder.data_dir.rstrip('/'))
  return (
    f'{builder.data_path} holds no array_record files, which random access needs; convert its files with: '
    f't2t-vit prepare --convert {folder} --data-dir NEW_FOLDER'
  )


def label_feature(builder: tfds.core.DatasetBuilder) -> str:
  """Name of the feature of a dataset that is the label."""
  return LABEL_FEATURES.get(builder.name, 'label')


def image_and_label(builder: tfds.core.DatasetBuilder) -> tuple[tuple[str, ...], int]:
  """Names of the classes of a dataset, and the number of labels of an image: 1, or `MAX_LABELS` for a sequence.

  Raises:
    UserError: the dataset lacks the features `image` and `label`.
  """
  features, label = dict(builder.info.features or {}), label_feature(builder)
  classes, num_labels = features.get(label), 1
  if isinstance(classes, tfds.features.Sequence):
    classes, num_labels = classes.feature, MAX_LABELS
  if not isinstance(features.get('image'), tfds.features.Image) or not isinstance(classes, tfds.features.ClassLabel):
    raise UserError(f'{builder.name} is no image-classification dataset: it lacks the features image and {label}')
  return tuple(classes.names), num_labels
