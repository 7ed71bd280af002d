"""Sources of images, and image folders as such; `tfds_source.py` has prepared datasets of tfds."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import filecmp
import hashlib
import os
from pathlib import Path
import re
import shlex
import stat
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from t2t_vit_jax.data.class_names import comparable, imagenet_names, labels_by_name
from t2t_vit_jax.data.decoding import BadImage, EncodedImage
from t2t_vit_jax.errors import DataError, UserError, printable

# What counts as an image in a folder, by its name: torchvision's list, and what else Pillow can read here.
IMAGE_SUFFIXES = frozenset(['.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp'])
IMAGE_SUFFIXES |= {'.avif', '.gif', '.jfif', '.jp2', '.jpe'} & Image.registered_extensions().keys()
# Folders that systems and programs leave in others, beside those whose name begins with a dot.
NO_DATA = frozenset(['@eaDir', '__MACOSX', '#recycle', '$RECYCLE.BIN', 'System Volume Information', 'lost+found'])
MAX_LABELS = 32  # of an image, where any of several is right
IMAGENET_COUNTS = {'train': 1_281_167, 'validation': 50_000}  # images of ImageNet-1k
NO_LABEL = -2  # fills up the labels of an image that has fewer
NO_CLASS = -3  # for a label that is greater than its dataset's number of classes
MAX_COMPARED = 20_000  # images of a folder that are searched for copies
# Names that the folder of a split may have.
SPLIT_FOLDERS = {'validation': ('validation', 'val', 'valid')}


class LayoutError(UserError):
  """A folder of images that lacks the folder of a split, or those of classes."""


class Record(NamedTuple):
  """One example as it is stored."""

  image: bytes  # an encoded image file
  label: int | tuple[int, ...]  # several, of which any is right, in a source with `num_labels` > 1
  id: str  # name of the example in messages, the same in every run


class Records(Protocol):
  """Random access to examples; pickles, so that worker processes can open it again."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...

  def fingerprint(self) -> str:
    """Checksum of names, labels, sizes and times of the files. Images are not read; see `Source.fingerprint`."""
    ...


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a dataset.

  Attributes:
    records: the examples.
    class_names: one per label.
    description: what it is and where, for messages.
    num_labels: number of labels of a record, which is filled up with `NO_LABEL`; 1 for a single label, a number.
    part: description of the part of a folder's images, if a share is held out.
    upright: whether images are turned as their EXIF data says.
    notes: lines for the user about what was left out, or looks wrong.
  """

  records: Records
  class_names: tuple[str, ...]
  description: str
  num_labels: int = 1
  part: str = ''
  upright: bool = False
  notes: tuple[str, ...] = ()

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

  def with_classes(self, class_names: Sequence[str]) -> 'Source':
    """The same examples with the labels of a model's classes, which are found by name.

    Raises:
      UserError: the model does not know one of the classes.
    """
    labels = labels_by_name(self.class_names, class_names, self.description)
    if labels == list(range(len(class_names))):
      return self
    return dataclasses.replace(self, records=_Relabelled(self.records, tuple(labels)), class_names=tuple(class_names))

  def for_model(self, class_names: Sequence[str] | None, num_classes: int) -> 'Source':
    """The same examples with the labels of a model's classes.

    Args:
      class_names: of the model; None if nobody knows them, as of published weights. With 1,000 classes they are then
        ImageNet's, if the examples' are of ImageNet, and classes named 0, 1, 2 ... are numbers. Others are taken in
        their order, which `notes` say.
      num_classes: of the model.

    Raises:
      UserError: the model does not know one of the classes, or has another number of classes.
    """
    synsets, own = tuple(imagenet_names()), comparable(self.class_names)
    if class_names is None and num_classes == len(synsets) and set(comparable(synsets)) >= set(own):
      class_names = synsets
    elif class_names is None and set(self.class_names) == set(map(str, range(num_classes))):
      class_names = tuple(map(str, range(num_classes)))  # folders of labels are in the order of text, 0, 1, 10, ...
    if class_names is not None:
      return self.with_classes(class_names)
    if num_classes != len(self.class_names):
      raise UserError(f'the model has {num_classes} classes, but {self.description} has {len(self.class_names)}')
    order = ', '.join(map(printable, self.class_names[:3]))
    note = f'the weights have no class names: those of {self.description} are taken in their order, {order} ...'
    return dataclasses.replace(self, notes=(*self.notes, note))

  def image_of(self, record: Record) -> EncodedImage:
    """Opens the image file of a record.

    Raises:
      BadImage: it is empty or no image; other damage shows when it is decoded.
    """
    return EncodedImage(record.image, upright=self.upright)

  def fingerprint(self) -> str:
    """Checksum that changes when the split does: its files, labels, classes, or how its images are turned.

    A file counts as changed if its name, size or time of change differs; its content is not read. The folder that
    holds the data does not count, so a copy that keeps the files' times has the same fingerprint.
    """
    return checksum([(self.records.fingerprint(), self.class_names, self.upright)])


def several_labels(labels: Iterable[int], name: str) -> tuple[int, ...]:
  """The labels of an image of which any is right, filled up to `MAX_LABELS` with `NO_LABEL`.

  Raises:
    DataError: there are more.
  """
  found = tuple(dict.fromkeys(map(int, labels)))
  if len(found) > MAX_LABELS:
    raise DataError(f'{name} has {len(found)} labels: no more than {MAX_LABELS} can be read')
  return found + (NO_LABEL,) * (MAX_LABELS - len(found))


@dataclasses.dataclass(frozen=True)
class _FolderRecords:
  """Files below a folder. Names are bytes in one array: 50 MB for ImageNet, and quick to hand to workers."""

  folder: Path
  names: np.ndarray  # relative to the folder, dtype 'S'
  labels: np.ndarray  # int32

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> Record:
    return Record(self.path(index).read_bytes(), int(self.labels[index]), os.fsdecode(self.names[index]))

  def fingerprint(self) -> str:
    """See `Records`."""
    files = zip(self.names.tolist(), self.labels.tolist(), map(self.path, range(len(self))), strict=True)
    return checksum((name, label, *size_and_time(path)) for name, label, path in files)

  def path(self, index: int) -> Path:
    """The file of an image."""
    return self.folder / os.fsdecode(self.names[index])

  def sizes(self) -> dict[int, list[int]]:
    """Numbers of the images by the size of their files in bytes."""
    numbers = collections.defaultdict(list)
    for index in range(len(self)):
      numbers[self.path(index).stat().st_size].append(index)
    return numbers

  def start(self, index: int) -> bytes:
    """The first 16 KiB of an image's file."""
    with self.path(index).open('rb') as file:
      return file.read(2**14)


@dataclasses.dataclass(frozen=True)
class _Relabelled:
  """Records with other labels."""

  records: Records
  labels: tuple[int, ...]  # by the records' own labels

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> Record:
    record = self.records[index]
    if isinstance(record.label, tuple):
      return record._replace(label=tuple(map(self._own, record.label)))
    return record._replace(label=self._own(record.label))

  def _own(self, label: int) -> int:
    """The label in place of a dataset's; one that belongs to no class is refused later."""
    if label < 0:
      return label
    return self.labels[label] if label < len(self.labels) else NO_CLASS

  def fingerprint(self) -> str:
    """See `Records`."""
    return checksum([(self.records.fingerprint(), self.labels)])


def size_and_time(path: Path) -> tuple[int, int]:
  """Bytes of a file, and when it changed, in ns; (-1, -1) if it is not there."""
  try:
    status = path.stat()
  except OSError:  # whoever reads the image will name it
    return -1, -1
  return status.st_size, status.st_mtime_ns


def checksum(rows: Iterable[tuple[Any, ...]]) -> str:
  """Checksum of numbers, strings and bytes."""
  digest = hashlib.sha256()
  for row in rows:
    digest.update(repr(row).encode() + b'\n')
  return digest.hexdigest()[:16]


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
  return _open_classes(_split_folder(Path(os.path.expanduser(path)), split), class_names)


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
  folder = Path(os.path.expanduser(path))
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


def open_classes(folder: Path) -> Source:
  """Opens the images of `folder/<class>/...`; its class folders give the labels, see `open_folder`.

  Raises:
    UserError: it has no class folders, or a class has no image.
  """
  return _open_classes(folder, None)


def _select(source: Source, chosen: np.ndarray, part: str) -> Source:
  records = source.records
  assert isinstance(records, _FolderRecords)
  records = _FolderRecords(records.folder, records.names[chosen], records.labels[chosen])
  return dataclasses.replace(source, records=records, description=f'{source.description} ({part})', part=part)


def _open_classes(folder: Path, class_names: tuple[str, ...] | None) -> Source:
  """Opens `folder/<class>/...`; see `open_folder`."""
  try:
    own_folders = {
      _as_utf8(entry.name): entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name)
    }
  except OSError as error:
    raise UserError(f'{folder} cannot be read: {error.strerror}') from error
  if not own_folders:
    if _holds_images(folder):
      raise LayoutError(
        f'{folder} has images, but no folders: move them to {folder}/CLASS/IMAGE, one folder for each class'
      )
    raise LayoutError(
      f'{folder} has no folders: images are expected as {folder}/CLASS/IMAGE, one folder for each class'
    )
  own_classes = sorted(own_folders)
  class_names = class_names or tuple(own_classes)
  folders = {key: own_folders[name] for key, name in zip(comparable(own_classes), own_classes, strict=True)}
  if len(folders) < len(own_classes):
    raise UserError(f'{folder} has two folders for one class: their names differ only in how an accent is written')
  known = comparable(class_names)
  if unknown := [folders[key] for key in folders.keys() - set(known)]:
    raise UserError(f'{folder} has classes that the training split lacks: {", ".join(sorted(unknown)[:3])}')
  scan, names, labels = _Scan(labelled=True), [], []
  for label, key in enumerate(known):
    images = sorted(scan.images(folder, folders[key])) if key in folders else []
    if not images and key in folders:
      raise UserError(f'{folder / folders[key]} has no images ({", ".join(sorted(IMAGE_SUFFIXES))})')
    names += images
    labels += [label] * len(images)
  records = _FolderRecords(folder, np.array(names), np.array(labels, np.int32))
  return Source(records, class_names, os.fspath(folder), notes=scan.notes(folder))


def _as_utf8(name: str) -> str:
  """The name of a file as UTF-8, whatever encoding Python takes from the locale: weights keep it as a class's name."""
  return os.fsencode(name).decode('utf-8', 'surrogateescape')


def _find_split(path: Path, split: str) -> Path | None:
  return next((path / name for name in SPLIT_FOLDERS.get(split, (split,)) if (path / name).is_dir()), None)


def _split_folder(path: Path, split: str) -> Path:
  if folder := _find_split(path, split):
    return folder
  if not path.is_dir():
    raise LayoutError(f'{path} is a file, no folder' if path.exists() else f'{path} does not exist')
  first, *others = SPLIT_FOLDERS.get(split, (split,))
  names = ' or '.join([first, *others])
  raise LayoutError(f'{path} has no folder {names}: images are expected as {path / first}/CLASS/IMAGE')


def _holds_images(folder: Path) -> bool:
  return any(x.suffix.lower() in IMAGE_SUFFIXES and x.is_file() for x in folder.iterdir())


def has_class_folders(path: str | os.PathLike[str]) -> bool:
  """Whether a folder has two folders or more with images, which may be its classes, whatever their names are."""
  path = Path(os.path.expanduser(path))
  try:
    return sum(x.is_dir() and not _is_hidden(x.name) and _holds_images(x) for x in path.iterdir()) >= 2
  except OSError:  # it is not there, or cannot be read
    return False


def note_copies(train: Source, evaluation: Source) -> Source:
  """Notes in `evaluation` how many of its images are copies of training images, byte for byte.

  Folders with at most `MAX_COMPARED` images are compared, and of files of one size the start is read first.
  """
  ours, theirs = evaluation.records, train.records
  if not (isinstance(ours, _FolderRecords) and isinstance(theirs, _FolderRecords)):
    return evaluation
  if len(ours) + len(theirs) > MAX_COMPARED:
    return evaluation
  try:
    our_sizes, their_sizes = ours.sizes(), theirs.sizes()
    common = our_sizes.keys() & their_sizes.keys() - {0}
    starts = {(size, theirs.start(index)): theirs.path(index) for size in common for index in their_sizes[size]}
    candidates = ((size, ours.path(index), ours.start(index)) for size in common for index in our_sizes[size])
    copies = [
      (path, original)
      for size, path, start in candidates
      if (original := starts.get((size, start))) and filecmp.cmp(path, original, shallow=False)
    ]
  except OSError:  # the run will name an image that cannot be read
    return evaluation
  if not copies:
    return evaluation
  copy, original = min(copies)
  note = (
    f'{len(copies):,} of the {len(ours):,} evaluation images are copies of training images, so their accuracy will '
    f'look too good: {printable(str(copy))} is {printable(str(original))}'
  )
  return dataclasses.replace(evaluation, notes=(*evaluation.notes, note))


def find_images(paths: Iterable[str | os.PathLike[str]], note: Callable[[str], None] = lambda line: None) -> list[str]:
  """Paths of image files, and of the images below folders.

  A file is taken whatever its name is. In folders, suffixes decide (`IMAGE_SUFFIXES`), and images come in the order of
  their paths. `note` gets lines about what was left out.

  Raises:
    UserError: there is no such file or folder, a folder cannot be read or has no images.
  """
  files: list[str] = []
  for path in map(Path, paths):
    if path.is_dir():
      scan = _Scan(labelled=False)
      names = sorted(scan.images(path))
      if not names:
        raise UserError(f'{path} has no images ({", ".join(sorted(IMAGE_SUFFIXES))})')
      files += [os.fspath(path / os.fsdecode(name)) for name in names]
      for line in scan.notes(path):
        note(line)
    elif path.is_file():
      files.append(os.fspath(path))
    else:
      hint = ': download the image first' if re.match('https?:/', os.fspath(path)) else ''
      raise UserError(f'{path} is no regular file' if path.exists() else f'there is no file or folder {path}{hint}')
  return files


def open_images(files: Sequence[str], *, upright: bool) -> Source:
  """Opens image files, which have no labels, in this order."""
  names = np.array([os.fsencode(file) for file in files])
  records = _FolderRecords(Path(), names, np.zeros(len(files), np.int32))
  return Source(records, ('',), 'the given images', upright=upright)


class _Scan:
  """Walks through folders, and remembers what it met besides images.

  Args:
    labelled: refuses links to a folder that was read before, whose images would get two labels; else skips them.
  """

  def __init__(self, *, labelled: bool):
    self._labelled = labelled
    self._folders: dict[tuple[int, int], str] = {}  # (device, inode) -> path
    self._skipped: collections.Counter[str] = collections.Counter()  # by suffix
    self._broken: list[str] = []  # links that lead nowhere
    self._special: list[str] = []  # devices, pipes and sockets with the name of an image, which may never end

  def images(self, folder: Path, subfolder: str = '') -> Iterator[bytes]:
    """Names of the image files in a folder or its subfolder and below, relative to `folder`; hidden ones are left out.

    Raises:
      UserError: a folder cannot be read, or a link leads to one that was read before.
    """
    path = os.path.join(folder, subfolder)
    try:
      if self._is_known(path):
        return
      with os.scandir(path) as entries:
        visible = [entry for entry in entries if not _is_hidden(entry.name)]
    except OSError as error:
      raise UserError(f'{error.filename} cannot be read: {error.strerror}') from error
    for entry in visible:
      name, suffix = os.path.join(subfolder, entry.name), os.path.splitext(entry.name)[1].lower()
      is_folder, is_file = entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False)
      if entry.is_symlink():
        try:
          mode = entry.stat().st_mode
        except OSError:  # it leads nowhere, or to itself
          self._broken.append(entry.path)
          continue
        is_folder, is_file = stat.S_ISDIR(mode), stat.S_ISREG(mode)
      if is_folder:
        yield from self.images(folder, name)
      elif suffix not in IMAGE_SUFFIXES:
        self._skipped[suffix or 'no suffix'] += 1
      elif is_file:
        yield os.fsencode(name)
      else:
        self._special.append(entry.path)

  def _is_known(self, path: str) -> bool:
    """Whether a folder was read before, by another path."""
    status = os.stat(path)
    before = self._folders.setdefault((status.st_dev, status.st_ino), path)
    if before == path or os.path.realpath(before) != os.path.realpath(path):  # some file systems lack inodes
      return False
    if self._labelled:
      raise UserError(f'{path} is the same folder as {before}, so its images would be read twice: remove the link')
    return True

  def notes(self, folder: Path) -> tuple[str, ...]:
    """Lines for the user about what lies in `folder` and was not read."""
    lines = []
    if self._skipped:
      by_count = sorted(self._skipped.items(), key=lambda item: (-item[1], item[0]))
      kinds = ', '.join(f'{count:,} {suffix}' for suffix, count in by_count[:5])
      lines.append(f'{folder}: files that are no images by their names were left out: {printable(kinds)}')
    for paths, what in ((self._broken, 'links lead nowhere'), (self._special, 'are no regular files and left out')):
      if paths:
        lines.append(f'{folder}: {len(paths):,} {what}, such as {printable(paths[0])}')
    return tuple(lines)


def _is_hidden(name: str) -> bool:
  return name.startswith('.') or name in NO_DATA


def prepare_command(name: str, data_dir: str | os.PathLike[str]) -> str:
  """The shell command that prepares a dataset for training."""
  manual_dir = ' --manual-dir FOLDER_OF_THE_TARS' if name.startswith('imagenet2012') else ''
  return f't2t-vit prepare {name}{manual_dir} --data-dir {shlex.quote(os.fspath(data_dir))}'


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
