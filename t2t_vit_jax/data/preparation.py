"""Writes tfds datasets as the array_record files that training reads, and checks what is written.

Needs TensorFlow for all but digits, which training does not: pip install 't2t-vit-jax[prepare]'.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import importlib.util
import os
from pathlib import Path
import shlex
import sys
import tarfile
import threading
from typing import Any

import requests
from tqdm import tqdm

from t2t_vit_jax.data.sources import IMAGENET_COUNTS, local_folder
from t2t_vit_jax.data.tfds_source import Digits, image_and_label, open_builder, tfds, without_array_record
from t2t_vit_jax.errors import UserError, free_space, full_disk, plural, readable_size, require

# Last: where an extra is missing, the line above has said so.
from array_record.python.array_record_data_source import ArrayRecordDataSource  # isort: skip

PATIENCE_S = 30  # for an answer to a download, each of three times
ARRAY_RECORD, TFRECORD = tfds.core.FileFormat.ARRAY_RECORD, tfds.core.FileFormat.TFRECORD
# Sizes in bytes of the tars of ILSVRC2012, and numbers of images in them. docs/data.md has the MD5 sums.
IMAGENET_TARS = {'ILSVRC2012_img_train.tar': 147_897_477_120, 'ILSVRC2012_img_val.tar': 6_744_924_160}
CORRUPTIONS_NEED = ('cv2', 'skimage', 'scipy')  # libraries of tfds's builder, which it imports when it is too late


def prepare(
  name: str, data_dir: str | None = None, manual_dir: str | None = None, allow_partial: bool = False
) -> tfds.core.DatasetInfo:
  """Runs the tfds builder of `name`, unless the dataset is prepared already, and counts the images in the files.

  Args:
    name: tfds name, such as 'imagenet2012' or 'cifar10'.
    data_dir: folder to write to; None for tfds's default.
    manual_dir: folder of files that must be fetched by hand, such as ImageNet's tars.
    allow_partial: take ImageNet tars that hold a part of the images.

  Raises:
    UserError: unknown or unsuitable dataset; missing, truncated or damaged files; wrong counts; full disk; failed
      download; TensorFlow not installed.
  """
  manual_path = Path(local_folder(manual_dir)) if manual_dir else None
  builder = open_builder(name, data_dir)
  image_and_label(builder)
  target = Path(builder.data_dir)
  counts: Mapping[str, int] = IMAGENET_COUNTS if builder.name == 'imagenet2012' and not allow_partial else {}
  if builder.info.splits:
    if ARRAY_RECORD not in builder.info.available_file_formats():
      raise UserError(without_array_record(builder))
    print(f'{target} is there already and is kept')
  elif target.exists():
    raise UserError(f'{target} has no dataset_info.json, as after an interrupted copy: delete it and start again')
  else:
    if builder.name == 'imagenet2012':
      tars = _imagenet_tars(manual_path, allow_partial)
      counts = _count_images(*tars) if allow_partial else IMAGENET_COUNTS
      # The builder takes the unlabelled test images too where it finds them.
      _require_space(target, [*tars, *tars[0].parent.glob('ILSVRC2012_img_test.tar')])
    if not isinstance(builder, Digits):
      require('this step', 'tensorflow')
    if builder.name == 'imagenet2012_corrupted' and not all(map(importlib.util.find_spec, CORRUPTIONS_NEED)):
      raise UserError(
        'this step needs OpenCV, scikit-image and SciPy: pip install opencv-python-headless scikit-image scipy; the '
        'published archives of ImageNet-C need no preparation, see docs/evaluate.md'
      )
    with _writing(target), _impatient_downloads():
      builder.download_and_prepare(
        file_format=ARRAY_RECORD, download_config=tfds.download.DownloadConfig(manual_dir=manual_path)
      )
  _verify(builder.info, counts)
  return builder.info


def convert(folder: str, data_dir: str) -> tfds.core.DatasetInfo:
  """Copies a tfrecord folder of tfds to array_record files: the same records, bit for bit and in the same order.

  Args:
    folder: holds dataset_info.json and the shards; it is only read.
    data_dir: the result goes to its subfolder name/[config/]version. What is there already is kept, and counted.

  Raises:
    UserError: no such folder, another format, damaged or missing shards, full disk, TensorFlow not installed.
  """
  source = _open_folder(local_folder(folder))
  image_and_label(source)
  if source.info.file_format != TFRECORD:
    raise UserError(f'{folder} holds {source.info.file_format.value} files: only tfrecord can be converted')
  counts = {name: split.num_examples for name, split in source.info.splits.items()}
  target = Path(local_folder(data_dir)) / source.info.full_name
  if target.exists():
    if target.samefile(source.data_dir):
      raise UserError(f'{folder} stays as it is: choose another --data-dir for the result')
    print(f'{target} is there already and is kept')
  else:
    require('this step', 'tensorflow')
    with _writing(target):
      _require_space(target, [shard for split in source.info.splits.values() for shard in split.filepaths])
      with tfds.core.utils.incomplete_dir(target) as temporary:
        _write_array_record(source.info, Path(temporary))
  info = _open_folder(str(target)).info
  _verify(info, counts)
  return info


def _write_array_record(info: tfds.core.DatasetInfo, folder: Path) -> None:
  """Writes the shards by public interfaces of tfds, whose own converter needs apache-beam and checks no counts."""
  import tensorflow as tf

  writer = tfds.core.ExampleWriter(ARRAY_RECORD)
  with tqdm(total=info.splits.total_num_examples, unit=' examples', disable=not sys.stderr.isatty()) as bar:

    def read(path: os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
      try:
        for key, record in enumerate(tf.data.TFRecordDataset(os.fspath(path)).as_numpy_iterator()):
          bar.update()
          yield key, record
      except tf.errors.OpError as error:  # such as a wrong check sum
        raise UserError(f'{path} is damaged') from error

    for split in info.splits.values():
      for old, new, length in zip(split.filepaths, _array_record_files(split), split.shard_lengths, strict=True):
        writer.write(folder / new.name, read(old))
        if (count := len(ArrayRecordDataSource(folder / new.name))) != length:
          raise UserError(f'{old} holds {count:,} images, dataset_info.json says {length:,}')
  info.set_file_format(ARRAY_RECORD, override=True, override_if_initialized=True)
  info.write_to_directory(folder)


def _open_folder(folder: str) -> tfds.core.DatasetBuilder:
  with _as_user_error(f'{folder} is no folder of a tfds dataset, such as DATA/imagenet2012/5.1.0'):
    return tfds.builder_from_directory(folder)


def _imagenet_tars(folder: Path | None, allow_partial: bool) -> list[Path]:
  if folder is None or not folder.is_dir():
    mistake = f': {folder} is no folder' if folder else ''
    raise UserError(f'give --manual-dir, the folder of {" and ".join(IMAGENET_TARS)}{mistake}')
  if missing := [name for name in IMAGENET_TARS if not (folder / name).is_file()]:
    others = sorted(path.name for path in folder.glob('*.tar*') if path.name not in IMAGENET_TARS)
    raise UserError(
      f'{" and ".join(missing)} not found in {folder}{", only " + ", ".join(others) if others else ""}: '
      'register at https://image-net.org/download-images and put the tars of ILSVRC2012 there'
    )
  for name, size in IMAGENET_TARS.items():
    if (num_bytes := (folder / name).stat().st_size) != size and not allow_partial:
      raise UserError(
        f'{folder / name} has {num_bytes:,} bytes, the official one {size:,}: complete the download, '
        'or add --allow-partial if it holds a part of ImageNet on purpose'
      )
  return [folder / name for name in IMAGENET_TARS]


def _count_images(train: Path, validation: Path) -> Mapping[str, int]:
  """Images per split, from the headers in the tars."""
  num_train = 0
  with _open_tar(train) as classes:
    for entry in filter(tarfile.TarInfo.isfile, classes):
      with tarfile.open(fileobj=classes.extractfile(entry), mode='r:') as images:
        num_train += sum(image.isfile() for image in images)
  with _open_tar(validation) as images:
    names = sorted(images.getnames())
  # The builder sorts the names that it finds, and the n-th gets the n-th label.
  if names != [f'ILSVRC2012_val_{i:08d}.JPEG' for i in range(1, len(names) + 1)]:
    raise UserError(
      f'images in {validation} would get wrong labels: it must hold ILSVRC2012_val_00000001.JPEG and those that '
      'follow, without a gap and without folders'
    )
  return {'train': num_train, 'validation': len(names)}


@contextlib.contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
  with _as_user_error(f'{path} is truncated or damaged'), tarfile.open(path, 'r:') as tar:
    yield tar
    last = tar.getmembers()[-1]
    if path.stat().st_size < last.offset_data + last.size + 1024:  # cut between two files, so no header shows it
      raise UserError(f'{path} is truncated or damaged: it lacks the end of a tar')


def _require_space(target: Path, files: Iterable[os.PathLike[str]]) -> None:
  """Raises UserError unless there is as much free space as `files` take: array_record files take the same."""
  files = list(files)
  if others := [path for path in files if not os.path.isfile(path)]:
    raise UserError(f'{others[0]} is missing, or no regular file')
  needed = 1.01 * sum(os.stat(path).st_size for path in files)
  free = free_space(target)
  if free < needed:
    raise UserError(f'{target} needs about {readable_size(needed)}, and its disk has {readable_size(free)} free')


def _array_record_files(split: tfds.core.SplitInfo) -> list[Path]:
  template = split.filename_template.replace(filetype_suffix=ARRAY_RECORD.file_suffix)
  return sorted(Path(path) for path in template.sharded_filepaths(split.num_shards))


def _verify(info: tfds.core.DatasetInfo, counts: Mapping[str, int]) -> None:
  """Raises UserError unless files, dataset_info.json and `counts` have the same numbers of images."""
  remedy = f'delete {info.data_dir} and start again'
  for name, split in info.splits.items():
    with _as_user_error(f'{info.data_dir} is damaged, {remedy}'):
      num_records = len(ArrayRecordDataSource(_array_record_files(split)))
    if num_records != split.num_examples:
      raise UserError(f'{info.data_dir} holds {num_records:,} of {split.num_examples:,} {name} images: {remedy}')
  if counts is IMAGENET_COUNTS:
    remedy += ', or add --allow-partial if a part of ImageNet is meant'
  for name, expected in counts.items():
    count = info.splits[name].num_examples if name in info.splits else 0
    if count != expected:
      raise UserError(f'{info.data_dir} holds {count:,} {name} images, not {expected:,}: {remedy}')


@contextlib.contextmanager
def _writing(target: Path, seconds: float = 60) -> Iterator[None]:
  """Shows progress while tfds fills a folder beside `target`: bars on a terminal, else a line from time to time."""

  def incomplete() -> set[Path]:
    return set(target.parent.glob(f'incomplete.*_{target.name}'))

  def report() -> None:
    while not finished.wait(seconds):
      with contextlib.suppress(FileNotFoundError):  # files come and go
        sizes = {path.name: path.stat().st_size for folder in incomplete() - leftovers for path in folder.iterdir()}
        shards = sum('-of-' in name for name in sizes)
        print(f'{target}: {readable_size(sum(sizes.values()))}, {plural(shards, "shard")}', file=sys.stderr, flush=True)

  leftovers, finished, on_terminal = incomplete(), threading.Event(), sys.stderr.isatty()
  for folder in sorted(leftovers):
    remedy = f'delete it unless another one is running: rm -r {shlex.quote(str(folder))}'
    print(f'note: an interrupted run left {folder}; {remedy}', file=sys.stderr)
  tfds.display_progress_bar(on_terminal)
  if not on_terminal:
    threading.Thread(target=report, daemon=True).start()
  try:
    with _as_user_error(f'cannot write {target}', target):
      yield
  finally:
    finished.set()
    tfds.display_progress_bar(True)


@contextlib.contextmanager
def _impatient_downloads() -> Iterator[None]:
  """Says what tfds fetches, and gives up on a server or a proxy that does not answer: tfds would try eleven times."""
  from tensorflow_datasets.core.download import downloader  # has no option for either

  get, tries = requests.Session.get, downloader.MAX_RETRIES

  def get_soon(session: requests.Session, url: str, **options: Any) -> requests.Response:
    print(f'fetching {url}', file=sys.stderr, flush=True)
    return get(session, url, **{'timeout': PATIENCE_S, **options})

  requests.Session.get, downloader.MAX_RETRIES = get_soon, 2  # type: ignore[method-assign, assignment]
  try:
    yield
  finally:
    requests.Session.get, downloader.MAX_RETRIES = get, tries  # type: ignore[method-assign]


@contextlib.contextmanager
def _as_user_error(problem: str, target: Path = Path()) -> Iterator[None]:
  """Turns errors of a dataset's code, a damaged file, a full disk or a lost connection into a UserError of one line.

  Args:
    problem: the line's beginning.
    target: what is written, if anything is.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    if 'No space left on device' in reason:
      reason = full_disk(target)
    raise UserError(f'{problem}: {reason[:400]}') from error
