"""Writes a copy of a dataset with smaller images, which decode faster, as an image folder.

t2t-vit shrink imagenet2012 --data-dir ~/tensorflow_datasets --output small --max-side 320
t2t-vit shrink --folder PHOTOS --output small --max-side 320 --quality 90
"""

import argparse
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, process
import dataclasses
import io
import multiprocessing
from pathlib import Path
import signal
import sys

import joblib
import numpy as np
from PIL import Image
from tqdm import tqdm

from t2t_vit_jax.command_line import Parser, run_tool
from t2t_vit_jax.data.decoding import BadImage, EncodedImage
from t2t_vit_jax.data.sources import SPLIT_FOLDERS, Source, has_class_folders, open_folder
from t2t_vit_jax.data.transforms import ResizeCenterCrop
from t2t_vit_jax.errors import UserError, plural, printable, readable_size, writing_problem

SPLITS = ('train', 'validation', 'test')  # that a folder may have
NUM_COMPARED = 64  # images of a split that are compared with their copies
MAX_NAMED = 10  # unreadable images
EVALUATION = ResizeCenterCrop(224, 0.9, 'bicubic')


@dataclasses.dataclass(frozen=True)
class Copy:
  """Outcome for an image: bytes before and after, its difference, and the reason if it could not be read."""

  id: str
  before: int = 0
  after: int = 0
  difference: float | None = None  # of the evaluation's pixels, mean of 0 to 255; None if not compared
  problem: str = ''


@dataclasses.dataclass(frozen=True)
class Shrinker:
  """Copies the images of a split, one by one; pickles for processes.

  Attributes:
    source: the split. Images are turned as it says, and the copy has no EXIF data.
    folder: where the copy goes, a folder for each class inside.
    max_side: px, the longer side at most.
    quality: of JPEG, up to 95.
  """

  source: Source
  folder: Path
  max_side: int
  quality: int

  def __call__(self, index: int) -> Copy:
    """Copies an image. What is there already is kept, so that a stopped run goes on."""
    name = f'image {index}'
    try:
      record = self.source[index]
      name = record.id
      assert isinstance(record.label, int)  # `shrink` refuses others
      image = self.source.image_of(record)
      target = self.folder / folder_name(self.source.class_names[record.label]) / f'{index:08d}.jpg'
      if target.exists():
        content = target.read_bytes()
      else:
        content = self.shrunk(image, record.image)
        partial = target.with_suffix('.partial')
        partial.write_bytes(content)
        partial.replace(target)
      difference = self.difference(image, content) if index < NUM_COMPARED else None
      return Copy(name, len(record.image), len(content), difference)
    except BadImage as error:
      return Copy(name, problem=str(error))

  def shrunk(self, image: EncodedImage, encoded: bytes) -> bytes:
    """The image as a JPEG file; its own bytes if it is one, small enough, and nothing has to be turned."""
    if max(image.width, image.height) <= self.max_side:
      with Image.open(io.BytesIO(encoded)) as file:
        if file.format == 'JPEG' and file.getexif().get(0x0112, 1) == 1:
          return encoded
    pixels = image.decode()
    scale = min(1, self.max_side / max(pixels.size))
    width, height = (max(1, round(scale * side)) for side in pixels.size)
    content = io.BytesIO()
    pixels.resize((width, height), Image.Resampling.LANCZOS).save(content, 'JPEG', quality=self.quality)
    return content.getvalue()

  @staticmethod
  def difference(image: EncodedImage, copy: bytes) -> float:
    """Mean difference of the pixels that an evaluation at 224 px sees, of 255."""
    pixels = (np.asarray(EVALUATION(file.decode()), int) for file in (image, EncodedImage(copy)))
    return float(np.abs(np.subtract(*pixels)).mean())


def folder_name(class_name: str) -> str:
  """A name for a class's folder: without a slash, and neither hidden nor the folder itself."""
  name = class_name.replace('/', '_')
  return f'_{name}' if name.startswith('.') or not name else name


_shrinker: Shrinker  # of a worker process


def _start_worker(shrinker: Shrinker) -> None:
  global _shrinker
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
  _shrinker = shrinker


def _copy(index: int) -> Copy:
  return _shrinker(index)


def shrink(shrinker: Shrinker) -> Iterator[Copy]:
  """Copies a split with all processors, in order.

  Raises:
    UserError: the folder cannot be written, two classes would share a folder, or a process died.
  """
  source, folder = shrinker.source, shrinker.folder
  if source.num_labels > 1:
    raise UserError(f'{source.description} has several labels for an image, so no folder is the one for it')
  names = {folder_name(name) for name in source.class_names}
  if len(names) < len(source.class_names):
    raise UserError(f'{source.description}: several classes would share a folder, since / is written as _')
  workers = ProcessPoolExecutor(
    joblib.cpu_count(), multiprocessing.get_context('spawn'), initializer=_start_worker, initargs=(shrinker,)
  )
  try:
    for name in names:
      (folder / name).mkdir(parents=True, exist_ok=True)
    yield from workers.map(_copy, range(len(source)), chunksize=64)
  except (OSError, process.BrokenProcessPool) as error:
    problem = writing_problem(error, folder) if isinstance(error, OSError) else 'a process died: out of memory?'
    raise UserError(f'cannot write {folder}: {problem}; the same command goes on') from error
  finally:
    workers.shutdown(wait=False, cancel_futures=True)


def report(copies: Iterable[Copy], total: int, folder: Path) -> list[str]:
  """Runs through the copies of a split with a bar on a terminal; lines about their sizes and differences."""
  before = after = unreadable = 0
  differences, lines = [], []
  for copy in tqdm(copies, folder.name, total, unit=' images', disable=not sys.stderr.isatty()):
    before, after = before + copy.before, after + copy.after
    if copy.difference is not None:
      differences.append(copy.difference)
    if copy.problem:
      unreadable += 1
      if unreadable <= MAX_NAMED:
        lines.append(f'not copied: {copy.id} cannot be read ({copy.problem})')
  if unreadable:
    lines.append(f'{unreadable:,} of {total:,} images of {folder} cannot be read and were not copied')
  lines.append(f'{folder}: {plural(total - unreadable, "image")}, {readable_size(before)} -> {readable_size(after)}')
  if differences:
    mean = sum(differences) / len(differences)
    lines.append(
      f'pixels differ: at 224 px an evaluation sees {mean:.2f} of 255 on average (first {len(differences)} images), so '
      'accuracies on the copy and on the original are not the same figure'
    )
  return lines


def open_splits(arguments: argparse.Namespace) -> dict[str, Source]:
  """The splits of the dataset by name; '.' is that of a folder whose own folders are the classes.

  Raises:
    UserError: there are none, or the copy would become a class.
  """
  if arguments.dataset:
    from t2t_vit_jax.data.tfds_source import open_builder, open_tfds  # late: folders need no tfds

    if not open_builder(arguments.dataset, arguments.data_dir).info.splits:
      open_tfds(arguments.dataset, 'train', arguments.data_dir)  # prepares digits, and says how others are prepared
    names = open_builder(arguments.dataset, arguments.data_dir).info.splits
    return {name: open_tfds(arguments.dataset, name, arguments.data_dir) for name in names}
  folder = Path(arguments.folder).expanduser()
  there = [name for name in SPLITS if any((folder / x).is_dir() for x in SPLIT_FOLDERS.get(name, (name,)))]
  if not there and has_class_folders(folder):
    there = ['.']
    if Path(arguments.output).expanduser().resolve().is_relative_to(folder.resolve()):
      raise UserError(f'{arguments.output} would be one of the classes in {folder}: choose an --output outside of it')
  return {name: dataclasses.replace(open_folder(folder, name), upright=True) for name in there or SPLITS[:1]}


def run(arguments: argparse.Namespace) -> int:
  """Does what the command line asks for; returns the exit code."""
  if (arguments.dataset is None) == (arguments.folder is None):
    raise UserError('give either a dataset or --folder FOLDER')
  if arguments.max_side < 1 or not 1 <= arguments.quality <= 95:
    raise UserError('--max-side must be positive, and --quality from 1 to 95')
  output = Path(arguments.output).expanduser()
  try:
    if arguments.folder and output.resolve() == Path(arguments.folder).expanduser().resolve():
      raise UserError(f'{output} stays as it is: choose another --output for the copy')
    splits = open_splits(arguments)
    for name, source in splits.items():
      shrinker = Shrinker(source, output / name, arguments.max_side, arguments.quality)
      for line in report(shrink(shrinker), len(source), output / name):
        print(printable(line))
  except KeyboardInterrupt:
    print('interrupted: what is copied stays; the same command goes on', file=sys.stderr)
    return 130
  fraction = ' --config.data.eval_fraction=0.2' if '.' in splits else ''
  print(printable(f'train on it with --config.data.source=folder --config.data.path={output}{fraction}'))
  return 0


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = Parser(
    'shrink',
    example='t2t-vit shrink --folder=PHOTOS --output=small --max-side=320',
    description=__doc__.split('\n\n')[0],
  )
  parser.add_argument('dataset', metavar='DATASET', nargs='?', help='prepared tfds dataset, such as imagenet2012')
  parser.add_argument(
    '--folder', metavar='DIR', help='image folder, DIR/train/CLASS/IMAGE or DIR/CLASS/IMAGE, in place of a tfds dataset'
  )
  parser.add_argument(
    '--data_dir',
    metavar='DIR',
    help='folder of the tfds dataset (default: TFDS_DATA_DIR or ~/tensorflow_datasets)',
  )
  parser.add_argument('--output', metavar='DIR', required=True, help='folder to write to')
  parser.add_argument(
    '--max_side', metavar='PX', type=int, default=320, help='length of the longer side at most (default: %(default)s)'
  )
  parser.add_argument(
    '--quality', metavar='N', type=int, default=90, help='quality of JPEG, 1 to 95 (default: %(default)s)'
  )
  return run_tool(lambda: run(parser.parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main())
