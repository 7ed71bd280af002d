"""Sources of images: prepared tfds datasets and image folders, both read by random access without TensorFlow."""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import hashlib
import os
from pathlib import Path
import shlex
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow_datasets as tfds

from t2t_vit_jax.data.digits import Digits
from t2t_vit_jax.data.transforms import BadImage
from t2t_vit_jax.errors import UserError, did_you_mean

# What counts as an image in a folder, by its name: torchvision's list.
IMAGE_SUFFIXES = frozenset(['.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp'])
# Names that the folder of a split may have.
SPLIT_FOLDERS = {'validation': ('validation', 'val', 'valid')}


class Record(NamedTuple):
  """One example as it is stored."""

  image: bytes  # an encoded image file
  label: int
  id: str  # name of the example in messages, the same in every run


class Records(Protocol):
  """Random access to examples; pickles, so that worker processes can open it again."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a dataset.

  Attributes:
    records: the examples.
    class_names: one per label.
    description: what it is and where, for messages.
    part: description of the part of a folder's images, if a share is held out.
  """

  records: Records
  class_names: tuple[str, ...]
  description: str
  part: str = ''

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> Record:
    """Reads a record.

    Raises:
      BadImage: its file, or its part of the array_record file, cannot be read.
      IndexError: there is no record of this number.
    """
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      return self.records[index]
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError for a wrong checksum
      raise BadImage(str(error)) from error


@dataclasses.dataclass(frozen=True)
class _TfdsRecords:
  """A tfds data source whose dicts become records."""

  examples: Any
  name: str  # dataset/split

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> Record:
    example = self.examples[index]
    file_name = example.get('file_name')
    return Record(
      example['image'], int(example['label']), f'{self.name}#{index}' if file_name is None else file_name.decode()
    )


@dataclasses.dataclass(frozen=True)
class _FolderRecords:
  """Files below a folder. Names are bytes in one array: 50 MB for ImageNet, and quick to hand to workers."""

  folder: Path
  names: np.ndarray  # relative to the folder, dtype 'S'
  labels: np.ndarray  # int32

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> Record:
    name = os.fsdecode(self.names[index])
    return Record((self.folder / name).read_bytes(), int(self.labels[index]), name)


def open_folder(path: str | os.PathLike[str], split: str, class_names: tuple[str, ...] | None = None) -> Source:
  """Opens `path/split/<class>/...`, the layout of PyTorch's ImageFolder.

  Labels number the class folders in the order of their names, which for ImageNet's synsets is tfds's order too.
  Images may lie in folders inside a class's folder; a file's suffix shows whether it is an image (`IMAGE_SUFFIXES`).

  Args:
    path: the folder of the splits.
    split: 'train', 'validation' (also found as 'val' and 'valid') or any other name.
    class_names: the training split's classes, for another split of the same dataset; None takes the split's own.

  Raises:
    UserError: folders are missing, a class is unknown or has no image.
  """
  return _open_classes(_split_folder(Path(path).expanduser(), split), class_names)


def open_divided_folder(
  path: str | os.PathLike[str], train_split: str, eval_split: str, eval_fraction: float
) -> tuple[Source, Source] | None:
  """Divides the images of a folder that has no evaluation split: a share of each class is held out for evaluation.

  The images lie in `path/train_split/<class>/...`, or in `path/<class>/...` without such a folder. Hashes of the names
  alone decide which are held out. A class with a single image keeps it for training.

  Returns:
    The images for training and for evaluation; None if there is a folder for evaluation.

  Raises:
    UserError: class folders hold folders but no images, a class has no image, or no class has two.
  """
  folder = Path(path).expanduser()
  if not folder.is_dir() or _find_split(folder, eval_split):
    return None
  split_folder = _find_split(folder, train_split)
  whole = _open_classes(split_folder or folder, None)
  records = whole.records
  assert isinstance(records, _FolderRecords)
  if split_folder is None:
    for label, name in enumerate(whole.class_names):
      if not any(os.fsdecode(image).count(os.sep) == 1 for image in records.names[records.labels == label]):
        raise UserError(
          f'{folder / name} has folders of images, but no image: if it is a split, name both with '
          '--config.data.train_split=FOLDER --config.data.eval_split=FOLDER; classes are expected as '
          f'{folder}/CLASS/IMAGE'
        )
  held_out = np.zeros(len(records), bool)
  for label in range(len(whole.class_names)):
    (members,) = np.nonzero(records.labels == label)
    by_hash = sorted(members, key=lambda index: hashlib.sha256(bytes(records.names[index])).digest())
    held_out[by_hash[: min(max(1, round(eval_fraction * len(members))), len(members) - 1)]] = True
  if not held_out.any():
    raise UserError(f'no class of {whole.description} has two images, so none can be held out for evaluation')
  return (
    _select(whole, ~held_out, f'all but the held-out {eval_fraction:.0%} of each class'),
    _select(whole, held_out, f'{eval_fraction:.0%} of each class, held out'),
  )


def _select(source: Source, chosen: np.ndarray, part: str) -> Source:
  records = source.records
  assert isinstance(records, _FolderRecords)
  records = _FolderRecords(records.folder, records.names[chosen], records.labels[chosen])
  return dataclasses.replace(source, records=records, description=f'{source.description} ({part})', part=part)


def _open_classes(folder: Path, class_names: tuple[str, ...] | None) -> Source:
  """Opens `folder/<class>/...`; see `open_folder`."""
  own_classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith('.'))
  if not own_classes:
    raise UserError(f'{folder} has no folders: images are expected as {folder}/CLASS/IMAGE, one folder for each class')
  class_names = class_names or tuple(own_classes)
  if unknown := set(own_classes) - set(class_names):
    raise UserError(f'{folder} has classes that the training split lacks: {", ".join(sorted(unknown)[:3])}')
  names, labels = [], []
  for label, class_name in enumerate(class_names):
    images = sorted(_images_below(folder, class_name)) if class_name in own_classes else []
    if not images and class_name in own_classes:
      raise UserError(f'{folder / class_name} has no images ({", ".join(sorted(IMAGE_SUFFIXES))})')
    names += images
    labels += [label] * len(images)
  records = _FolderRecords(folder, np.array(names), np.array(labels, np.int32))
  return Source(records, class_names, os.fspath(folder))


def _find_split(path: Path, split: str) -> Path | None:
  return next((path / name for name in SPLIT_FOLDERS.get(split, (split,)) if (path / name).is_dir()), None)


def _split_folder(path: Path, split: str) -> Path:
  if folder := _find_split(path, split):
    return folder
  candidates = [path / name for name in SPLIT_FOLDERS.get(split, (split,))]
  problem = 'does not exist' if not path.is_dir() else f'has no folder {" or ".join(x.name for x in candidates)}'
  raise UserError(f'{path} {problem}: images are expected as {candidates[0]}/CLASS/IMAGE')


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
  """Paths of image files, and of the images below folders.

  A file is taken whatever its name is. In folders, suffixes decide (`IMAGE_SUFFIXES`), and images come in the order of
  their paths.

  Raises:
    UserError: there is no such file or folder, a folder cannot be read or has no images.
  """
  files: list[str] = []
  for path in map(Path, paths):
    if path.is_dir():
      names = sorted(_images_below(path))
      if not names:
        raise UserError(f'{path} has no images ({", ".join(sorted(IMAGE_SUFFIXES))})')
      files += [os.fspath(path / os.fsdecode(name)) for name in names]
    elif path.exists():
      files.append(os.fspath(path))
    else:
      raise UserError(f'there is no file or folder {path}')
  return files


def open_images(files: Sequence[str]) -> Source:
  """Opens image files, which have no labels, in this order."""
  names = np.array([os.fsencode(file) for file in files])
  records = _FolderRecords(Path(), names, np.zeros(len(files), np.int32))
  return Source(records, ('',), 'the given images')


def _images_below(folder: Path, subfolder: str = '') -> Iterator[bytes]:
  """Names of the image files in a folder or its subfolder and below, relative to `folder`."""

  def refuse(error: OSError) -> None:
    raise UserError(f'{error.filename} cannot be read: {error.strerror}')

  for parent, _, files in os.walk(folder / subfolder, onerror=refuse, followlinks=True):
    relative = os.path.relpath(parent, folder)
    for name in files:
      if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith('.'):
        yield os.fsencode(name if relative == '.' else os.path.join(relative, name))


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
    builder = _prepare_digits(builder)
  command = prepare_command(name, builder.data_dir_root)
  if not builder.info.splits:
    raise UserError(f'{name} is not prepared, {builder.data_path} has no data; prepare it with: {command}')
  features = image_and_label(builder)
  try:
    records = builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})
  except NotImplementedError as error:
    raise UserError(without_array_record(builder)) from error
  except (ValueError, AssertionError) as error:
    raise UserError(f'{name} has no split {split!r}: {did_you_mean(split, builder.info.splits)}') from error
  if not len(records):
    raise UserError(f'split {split!r} of {name} is empty')
  return Source(
    _TfdsRecords(records, f'{name}/{split}'), tuple(features['label'].names), f'{name} {split} ({builder.data_path})'
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
    raise UserError(f"{name} needs TensorFlow: pip install 't2t-vit-jax[prepare]'") from error
  except OSError as error:
    raise UserError(f'cannot read {data_dir}: {error.strerror or str(error).splitlines()[0]}') from error
  except Exception as error:  # no such config or version, damaged metadata: tfds raises errors of many kinds
    raise UserError(f'tfds cannot build {name!r}: {str(error).splitlines()[0]}') from error


def _prepare_digits(builder: Digits) -> Digits:
  tfds.disable_progress_bar()  # four bars for half a second's work
  try:
    builder.download_and_prepare()  # returns at once where the files exist
    return builder
  except FileExistsError:  # another process was faster
    return Digits(data_dir=builder.data_dir_root, file_format='array_record')
  except OSError as error:
    raise UserError(f'cannot write to {builder.data_path}: {error.strerror}') from error
  finally:
    tfds.enable_progress_bar()


def prepare_command(name: str, data_dir: str | os.PathLike[str]) -> str:
  """The shell command that prepares a dataset for training."""
  manual_dir = ' --manual-dir FOLDER_OF_THE_TARS' if name.startswith('imagenet2012') else ''
  return f'python -m t2t_vit_jax.data.prepare {name}{manual_dir} --data-dir {shlex.quote(os.fspath(data_dir))}'


def without_array_record(builder: tfds.core.DatasetBuilder) -> str:
  """Error message for a dataset that is prepared in a format without random access, such as tfrecord."""
  folder = shlex.quote(builder.data_dir.rstrip('/'))
  return (
    f'{builder.data_path} holds no array_record files, which random access needs; convert its files with: '
    f'python -m t2t_vit_jax.data.prepare --convert {folder} --data-dir NEW_FOLDER'
  )


def image_and_label(builder: tfds.core.DatasetBuilder) -> dict[str, Any]:
  """The features of a dataset, which must have an image and a class.

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
