"""Rows of figures of evaluations: kept in a file as they come, summed up, and shown as one table."""

from collections.abc import Iterable, Iterator, Sequence
import functools
import json
from pathlib import Path
from typing import Any

from t2t_vit_jax.errors import UserError, plural, printable, writing_problem
from t2t_vit_jax.evaluate import tables
from t2t_vit_jax.evaluate.accuracy import Row, identity
from t2t_vit_jax.evaluate.sets import ALEXNET_ERRORS, SEVERITIES
from t2t_vit_jax.evaluate.tables import Table, percent

CORRUPTED = 'c'  # name of the row that sums up ImageNet-C
COLUMNS = ('weights', 'set', 'top-1 %', 'top-5 %', 'images', 'images/s', 'parameters', 'MB', 'px', 'data')
NUMBERS = COLUMNS[2:9]  # columns whose cells are aligned on the right
START = '{"weights": '  # of each line
FIELDS: dict[str, Any] = {  # that a row must have, and their kinds
  **dict.fromkeys(('weights', 'sha256', 'set', 'version', 'dtype'), str),
  **dict.fromkeys(('top1', 'top5', 'loss', 'seconds', 'images_per_second'), float),
  **dict.fromkeys(('count', 'correct', 'correct_top5', 'unreadable', 'left_out', 'parameters', 'bytes'), int),
  'scored_classes': int,
  'image_size': int | list,
  'reliability': dict,
}
CSV_FIELDS = (
  'weights',
  'set',
  'version',
  'top1',
  'top5',
  'mean_corruption_error',
  'count',
  'correct',
  'correct_top5',
  'unreadable',
  'left_out',
  'scored_classes',
  'loss',
  'images_per_second',
  'model',
  'parameters',
  'bytes',
  'image_size',
  'dtype',
  'sha256',
)


class Results:
  """Rows of finished evaluations in a file with a line for each, as JSON.

  Args:
    path: the file, which need not exist.
  """

  def __init__(self, path: Path):
    self._path = path
    self.added = 0  # rows

  @functools.cached_property
  def _rows(self) -> dict[tuple[Any, ...], Row]:
    """Rows by their `identity`, the newest of each."""
    try:
      lines = self._path.read_text('utf-8').splitlines() if self._path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f'{self._path} cannot be read as results of evaluations: choose another --results') from error
    rows = list(filter(None, map(_parse, lines)))
    # A process that was killed, or a full disk, leaves the start of a line: that is no other file.
    if not rows and any(line[: len(START)] != START[: len(line)] for line in lines):
      raise UserError(f'{self._path} holds no results of evaluations: choose another --results')
    return {identity(row): row for row in rows if not row['unreadable']}  # they may be readable by now

  def find(self, wanted: tuple[Any, ...]) -> Row | None:
    """The newest row of the evaluation with this `identity`; None if there is none.

    Raises:
      UserError: the file can't be read, or holds something else.
    """
    return self._rows.get(wanted)

  def add(self, row: Row) -> None:
    """Appends a row to the file.

    Raises:
      UserError: the file can't be written.
    """
    try:
      with self._path.open('a+b') as file:
        broken = file.tell() and (file.seek(-1, 2), file.read(1))[1] != b'\n'  # a killed process may leave half a line
        file.write((b'\n' if broken else b'') + json.dumps(row).encode() + b'\n')
      self.added += 1
    except OSError as error:
      raise UserError(f'{self._path} cannot be written: {writing_problem(error, self._path)}') from error


def _parse(line: str) -> Row | None:
  """The row of a line; None for anything else, such as the half line of a process that was killed."""
  try:
    row = json.loads(line)
    complete = isinstance(row, dict) and all(isinstance(row[field], kind) for field, kind in FIELDS.items())
    hash(identity(row))
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return None
  return row if complete else None


def corruption_row(rows: Sequence[Row]) -> Row | None:
  """Sums up the rows of ImageNet-C of one file of weights; None if there are none.

  `top1` and `top5` are means over corruptions and severities. `corruptions` has the accuracies of each corruption by
  severity, and its error: the sum over severities as a share of AlexNet's, see `ALEXNET_ERRORS`. Their mean is the
  `mean_corruption_error`. Errors are None where a severity is missing.
  """
  parts = {tuple(row['corruption']): row for row in rows if row.get('corruption')}
  if not parts:
    return None
  corruptions: dict[str, dict[str, Any]] = {}
  for name, alexnet_error in ALEXNET_ERRORS.items():
    found = [parts.get((name, severity)) for severity in SEVERITIES]
    top1 = [None if row is None else row['top1'] for row in found]
    mean = _mean(top1)
    corruptions[name] = {'top1': top1, 'error': None if mean is None else (1 - mean) / alexnet_error}
  first, every = next(iter(parts.values())), list(parts.values())
  return {
    **{name: first[name] for name in ('weights', 'sha256', 'model', 'parameters', 'bytes', 'image_size', 'dtype')},
    'set': CORRUPTED,
    'version': f'{len(every)} of {len(ALEXNET_ERRORS) * len(SEVERITIES)} parts of {_common_start(every)}',
    'top1': sum(row['top1'] for row in every) / len(every),
    'top5': sum(row['top5'] for row in every) / len(every),
    **{name: sum(row[name] for row in every) for name in ('count', 'unreadable', 'left_out')},
    'images_per_second': len(every) / sum(1 / row['images_per_second'] for row in every),
    'mean_corruption_error': _mean([each['error'] for each in corruptions.values()]),
    'corruptions': corruptions,
  }


def _mean(values: Sequence[float | None]) -> float | None:
  """The mean; None if a value is missing."""
  present = [value for value in values if value is not None]
  return sum(present) / len(values) if len(present) == len(values) else None


def _common_start(rows: Sequence[Row]) -> str:
  names = {str(row['version']).partition('/')[0] for row in rows}
  return names.pop() if len(names) == 1 and '' not in names else 'ImageNet-C'


def with_corruption_rows(rows: Iterable[Row]) -> list[Row]:
  """The rows, and after those of ImageNet-C of the same weights the one that sums them up."""
  found: list[Row] = []
  by_weights: dict[str, list[Row]] = {}
  for row in rows:
    by_weights.setdefault(row['weights'], []).append(row)
  for each in by_weights.values():
    found += each
    if summed := corruption_row(each):
      found.append(summed)
  return found


def _cells(row: Row) -> tuple[str, ...]:
  """The cells of `COLUMNS`."""
  return (
    printable(row['weights']),
    printable(row['set']),
    percent(row['top1']),
    percent(row['top5']),
    f'{row["count"]:,}',
    f'{row["images_per_second"]:,.0f}',
    f'{row["parameters"] / 1e6:.1f} M',
    f'{row["bytes"] / 1e6:.1f}',
    _pixels(row['image_size']),
    printable(row['version']),
  )


def _pixels(size: int | Sequence[int]) -> str:
  return str(size) if isinstance(size, int) else 'x'.join(map(str, size))


def _tables(rows: Sequence[Row]) -> Iterator[Table]:
  """The main table, and one for each model's accuracies on ImageNet-C."""
  yield Table(COLUMNS, [_cells(row) for row in rows if not row.get('corruption')], NUMBERS)
  for row in rows:
    if 'corruptions' in row:
      numbers = (*(f'severity {severity}' for severity in SEVERITIES), 'error %')
      cells = [(name, *map(percent, each['top1']), percent(each['error'])) for name, each in row['corruptions'].items()]
      columns = zip(*(each['top1'] for each in row['corruptions'].values()), strict=True)
      cells.append(('mean', *(percent(_mean(column)) for column in columns), percent(row['mean_corruption_error'])))
      yield Table((f'{printable(row["weights"])}, c', *numbers), cells, numbers)


def _notes(rows: Sequence[Row]) -> Iterator[str]:
  """Lines about what the figures don't show."""
  for row in rows:
    where = f'{printable(row["weights"])} on {printable(row["set"])}'
    if row['unreadable']:
      yield f'{where}: {plural(row["unreadable"], "image")} cannot be read: counted as wrong'
    if row['left_out']:
      yield f'{where}: {plural(row["left_out"], "image")} without a label of the scored classes, not counted'
  if any('corruptions' in row for row in rows):
    yield "error: of all severities, as a share of AlexNet's; top-1 % and top-5 % of c are means over its parts"


def render(rows: Sequence[Row], form: str) -> str:
  """The rows in one of the forms of `tables.render`, with one more for each model on ImageNet-C."""
  rows = with_corruption_rows(rows)
  return tables.render(form, rows, list(_tables(rows)), list(_notes(rows)), CSV_FIELDS)
