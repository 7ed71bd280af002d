"""Where images come from: prepared tfds datasets, read by random access without TensorFlow."""

import dataclasses
import os
import shlex
from typing import Any, Protocol

import tensorflow_datasets as tfds

from t2t_vit_jax.data.digits import Digits
from t2t_vit_jax.errors import UserError, did_you_mean


class Records(Protocol):
  """Random access to encoded examples; pickles, so that worker processes can open it again."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a dataset.

  Attributes:
    records: examples with `image` (the encoded file's bytes) and `label` (int).
    class_names: one per label.
    description: what and where, for messages.
  """

  records: Records
  class_names: tuple[str, ...]
  description: str

  def __len__(self) -> int:
    return len(self.records)


def open_tfds(name: str, split: str, data_dir: str | None = None) -> Source:
  """Opens a split of a tfds image-classification dataset prepared as array_record files.

  `digits` is prepared on first use, since its images come with scikit-learn.

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
    _prepare_digits(builder)
  command = prepare_command(name, builder.data_dir_root)
  if not builder.info.splits:
    raise UserError(f'{name} is not prepared, {builder.data_path} has no data; prepare it with: {command}')
  features = image_and_label(builder)
  try:
    records = builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})
  except NotImplementedError as error:
    raise UserError(without_array_record(builder)) from error
  except (ValueError, AssertionError) as error:
    splits = did_you_mean(split, builder.info.splits)
    raise UserError(f'{name} has no split {split!r}: {splits}') from error
  if not len(records):
    raise UserError(f'split {split!r} of {name} is empty')
  return Source(records, tuple(features['label'].names), f'{name} {split} ({builder.data_path})')


def open_builder(name: str, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
  """The tfds builder of `name`, prepared or not.

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
    raise UserError(f"{name} needs TensorFlow: pip install 't2t-vit-jax[prepare]'") from error
  except OSError as error:
    raise UserError(f'cannot read {data_dir}: {error.strerror or str(error).splitlines()[0]}') from error
  except Exception as error:  # no such config or version, damaged metadata: tfds raises what comes
    raise UserError(f'tfds cannot build {name!r}: {str(error).splitlines()[0]}') from error


def _prepare_digits(builder: Digits) -> None:
  tfds.disable_progress_bar()  # four bars for half a second's work
  try:
    builder.download_and_prepare()  # returns at once where the files exist
  except OSError as error:
    raise UserError(f'cannot write to {builder.data_path}: {error.strerror}') from error
  finally:
    tfds.enable_progress_bar()


def prepare_command(name: str, data_dir: str | os.PathLike[str]) -> str:
  """The shell command that prepares a dataset for training."""
  manual_dir = ' --manual-dir FOLDER_OF_THE_TARS' if name.startswith('imagenet2012') else ''
  return f'python -m t2t_vit_jax.data.prepare {name}{manual_dir} --data-dir {shlex.quote(os.fspath(data_dir))}'


def without_array_record(builder: tfds.core.DatasetBuilder) -> str:
  """What to say about a dataset that is prepared in a format without random access, such as tfrecord."""
  folder = shlex.quote(builder.data_dir.rstrip('/'))
  return (
    f'{builder.data_path} holds no array_record files, which random access needs; convert what is there with: '
    f'python -m t2t_vit_jax.data.prepare --convert {folder} --data-dir NEW_FOLDER'
  )


def image_and_label(builder: tfds.core.DatasetBuilder) -> dict[str, Any]:
  """The features of a dataset that has an image and a class.

  Raises:
    UserError: the dataset has no such features.
  """
  features = dict(builder.info.features or {})
  if not isinstance(features.get('image'), tfds.features.Image) or not isinstance(
    features.get('label'), tfds.features.ClassLabel
  ):
    raise UserError(f'{builder.name} is no image-classification dataset: it lacks the features image and label')
  return features


def local_folder(folder: str) -> str:
  """`folder` with ~ expanded.

  Raises:
    UserError: a gs:// address, which random access cannot read; the message has the command that mounts it.
  """
  if not folder.startswith('gs://'):
    return os.path.expanduser(folder)
  bucket, _, path = folder.removeprefix('gs://').strip('/').partition('/')
  raise UserError(
    f'{folder} is no folder, and random access needs one: mount the bucket with '
    f'`mkdir -p ~/{bucket} && gcsfuse --implicit-dirs {bucket} ~/{bucket}` and use ~/{bucket}{path and "/" + path}'
  )
