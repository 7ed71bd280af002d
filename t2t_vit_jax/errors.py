"""Errors that the user can correct, full disks, checks of a config's numbers, and names: shown safely, looked up."""

from collections.abc import Iterable, Mapping
import csv
import difflib
import importlib.util
import io
import math
import os
from pathlib import Path
import shutil
import sys
from typing import Any, TypeVar
import warnings

Key = TypeVar('Key')
Row = TypeVar('Row')
MAX_NAMES = 80  # that a message lists
# Libraries that only some tools need, and the extra that brings each; docs/install.md says who needs which.
EXTRAS = {
  'cykooz_resizer': 'fast',
  'gcsfs': 'gcs',
  'huggingface_hub': 'hub',
  'jax2onnx': 'onnx',
  'jax_cuda13_plugin': 'gpu-plan',
  'libtpu': 'tpu',
  'matplotlib': 'plots',
  'mlflow': 'mlflow',
  'onnx': 'onnx',
  'onnxruntime': 'onnx',
  'simplejpeg': 'fast',
  'sklearn': 'probe',
  'starlette': 'serve',
  'tensorflow': 'prepare',
  'tensorflow_datasets': 'tfds',
  'torch': 'torch',
  'uvicorn': 'serve',
  'wandb': 'wandb',
}
FORMULA_STARTS = ('=', '+', '-', '@', '\uff1d', '\uff0b', '\uff0d', '\uff20')  # the last four: the first in full width


class UserError(ValueError):
  """Input that the user can correct: scripts print it as one line and exit with code 2."""


class DataError(UserError):
  """Data that fails while a run reads it: what the run has done so far is good."""


class MissingExtraError(UserError):
  """A library that is not installed: the message names it and the command that installs it.

  Args:
    purpose: what needs it, as the start of the message.
    library: the name under which it is imported, such as one of `EXTRAS`.
    advice: the end of the message.
  """

  def __init__(self, purpose: str, library: str, advice: str = ''):
    self.library = library
    super().__init__(f'{purpose} needs {library}: {install_command(EXTRAS.get(library))}{advice}')


def install_command(extra: str | None) -> str:
  """The shell command that installs this package with an extra: from its checkout, where it is imported from there."""
  checkout = Path(__file__).parents[1]
  brackets = f'[{extra}]' if extra else ''
  if (checkout / 'pyproject.toml').is_file():
    return f"pip install -e '{'.' if checkout == Path.cwd() else checkout}{brackets}'"
  return f"pip install 't2t-vit-jax{brackets}'"


def require(purpose: str, *libraries: str, advice: str = '') -> None:
  """Raises MissingExtraError for the first of the libraries that is not installed; imports none."""
  for library in libraries:
    if importlib.util.find_spec(library) is None:
      raise MissingExtraError(purpose, library, advice)


def writing_problem(error: BaseException, place: str | os.PathLike[str], needed: int = 0) -> str:
  """A line that says why something could not be written at or below `place`, in the words of whichever library failed.

  Args:
    error: what that library raised.
    place: a file or folder, which need not exist.
    needed: bytes that were to be written, at least; 0 if nobody knows.
  """
  if 'No space left on device' in str(error):
    return full_disk(place, needed)
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return first_line(error)


def first_line(error: BaseException, *, kind: bool = True) -> str:
  """The first line of an error's text that is not empty, up to 300 characters, for a message.

  Args:
    error: of any library.
    kind: whether the error's kind stands before the line. It stands alone for an error without a text.
  """
  name, text = type(error).__name__, next(filter(None, map(str.strip, str(error).splitlines())), '')
  return printable(f'{name}: {text}' if kind and text else text or name)[:300]


def full_disk(place: str | os.PathLike[str], needed: int = 0) -> str:
  """A phrase that says that the disk of `place` is full, what is free there and how many bytes were `needed`."""
  free = readable_size(free_space(place))
  if needed:
    return f'the disk is full: at least {readable_size(needed)} are needed, {free} are free'
  return f'the disk is full: more is needed than the {free} that are free'


def free_space(place: str | os.PathLike[str]) -> int:
  """Free bytes on the disk of a file or folder, which need not exist."""
  path = Path(place).absolute()
  return shutil.disk_usage(next(folder for folder in (path, *path.parents) if os.path.exists(folder))).free


def readable_size(num_bytes: float) -> str:
  """Bytes in the largest unit of which there is at least one, such as '21.5 MB'."""
  for name, unit in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if num_bytes >= unit:
      return f'{num_bytes / unit:.1f} {name}'
  return plural(round(num_bytes), 'byte')


def plural(number: int, noun: str) -> str:
  """A number with its noun, such as '1 image' and '1,000 images'."""
  return f'{number:,} {noun}' + ('' if number == 1 else 'es' if noun.endswith('s') else 's')


def printable(text: str) -> str:
  """Escapes unprintable characters as Python does, so that `text` stays on one line of a terminal."""
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def show_warnings_as_lines() -> None:
  """Shows warnings of libraries, such as Pillow's about an image, as one line each, without their place in the code."""
  warnings.showwarning = lambda message, *unused: print(printable(f'warning: {message}'), file=sys.stderr)


def csv_line(*values: Any) -> str:
  """A line of a CSV file: names are `printable`, and a ' before what a spreadsheet would run as a formula."""
  cells = [printable(value) if isinstance(value, str) else value for value in values]
  cells = [f"'{cell}" if str(cell).lstrip().startswith(FORMULA_STARTS) else cell for cell in cells]
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerow(cells)
  return text.getvalue()


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """A phrase with the names in `known` that are most like `name`, or with all if none is like it and they are few."""
  known = sorted(set(known))
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
  if near:
    return f'did you mean {" or ".join(map(repr, near))}?'
  return f'known names: {", ".join(known)}' if len(known) <= MAX_NAMES else 'no name is like it'


def check_positive(field: str, number: float) -> None:
  """Raises UserError, naming the config's `field`, unless its number is above 0."""
  if not number > 0:
    raise UserError(f'{field} must be positive, not {number}')


def check_not_negative(field: str, number: float) -> None:
  """Raises UserError, naming the config's `field`, unless its number is at least 0."""
  if not number >= 0:
    raise UserError(f'{field} must not be negative, not {number}')


def check_share(field: str, number: float) -> None:
  """Raises UserError, naming the config's `field`, unless its number is a share, from 0 to 1."""
  if not 0 <= number <= 1:
    raise UserError(f'{field} must lie between 0 and 1, not {number}')


def check_interval(field: str, interval: tuple[float, float], most: float = math.inf) -> None:
  """Raises UserError, naming the config's `field`, unless it holds two numbers, 0 < low <= high <= `most`."""
  if len(interval) != 2 or not 0 < interval[0] <= interval[1] <= most:
    above = f' and up to {most:g}' if most < math.inf else ''
    raise UserError(f'{field} must hold two numbers above 0{above}, the smaller one first, not {interval}')


def choose(table: Mapping[Key, Row], field: str, name: Key) -> Row:
  """Looks up `name`, the value of the config's `field`, in `table`.

  Raises:
    UserError: the table has no such row; the message names `field`.
  """
  if name not in table:
    raise UserError(f'{field} must be {" or ".join(map(repr, table))}, not {name!r}')
  return table[name]
