"""`report.png`: a run's curves and some images as the network saw them, on one page."""

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from t2t_vit_jax.conversion.files import write_file
from t2t_vit_jax.errors import printable, require

if TYPE_CHECKING:
  from matplotlib.axes import Axes

GRID_COLUMNS = 8
MAX_DRAWN = 1e30  # matplotlib computes with the squares of numbers
Row = dict[str, Any]
COLORS = {'raw': 'C1', 'ema': 'C2'}  # of evaluated weights, in every plot


def write_report(workdir: str | os.PathLike[str], images: np.ndarray, title: str) -> Path:
  """Draws `metrics.jsonl` of a workdir.

  Args:
    workdir: the folder; the page is written there.
    images: (N, H, W, C) uint8, augmented training images.
    title: of the page.

  Returns:
    The file.

  Raises:
    UserError: it can't be written.
    MissingExtraError: matplotlib is not installed.
  """
  require('drawing its curves', 'matplotlib')
  rows = [row for _, row in read_rows(Path(workdir) / 'metrics.jsonl') if row]
  trained = [row for row in rows if row['kind'] == 'train']
  evaluated: dict[str, list[Row]] = {}
  for row in rows:
    if 'weights' in row:
      evaluated.setdefault(f'{row["kind"]} {row["weights"]}', []).append(row)

  from matplotlib.figure import Figure  # late: it takes half a second, and every process of a run would wait for it

  # Without pyplot: no display, no global state. Without a layout engine, which takes a second.
  figure = Figure(figsize=(12, 8))
  figure.suptitle(printable(title), parse_math=False)
  curves, sample = figure.subfigures(2, 1, squeeze=False).flat
  loss, accuracy, rate = curves.subplots(1, 3, gridspec_kw={'left': 0.05, 'right': 0.98, 'bottom': 0.12, 'top': 0.82})
  _curve(loss, 'loss', {'train, with augmentation': trained} | evaluated, 'loss')
  _curve(accuracy, 'top-1 accuracy', evaluated, 'top1')
  _curve(rate, 'learning rate', {'': trained}, 'learning_rate')
  axes = sample.subplots(gridspec_kw={'left': 0.02, 'right': 0.98, 'bottom': 0.02, 'top': 0.92})
  axes.imshow(image_grid(images), interpolation='nearest')
  axes.set_title('training images as the network saw them', fontsize='medium')
  axes.axis('off')
  file = Path(workdir) / 'report.png'
  write_file(file, lambda temporary: figure.savefig(temporary, format='png', dpi=100))
  return file


def read_rows(file: Path) -> list[tuple[str, Row | None]]:
  """Reads a `metrics.jsonl`: each line with its row; None if it is none, such as the last line of a killed process."""
  return [(line, _row(line)) for line in file.read_text('utf-8', 'surrogateescape').split('\n') if line]


def _row(line: str) -> Row | None:
  try:
    row = json.loads(line, parse_int=float)  # an int of many digits is infinity then, and no error later
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict) or not isinstance(step := row.get('step'), float) or not abs(step) < MAX_DRAWN:
    return None
  return row if isinstance(row.get('kind'), str) and isinstance(row.get('weights', ''), str) else None


def _curve(axes: 'Axes', title: str, series: dict[str, list[Row]], value: str) -> None:
  for label, rows in series.items():
    steps = [row['step'] for row in rows]
    color = COLORS.get(label.rpartition(' ')[2], 'C0')
    marker = '.' if len(rows) < 30 else ''
    numbers = [x if isinstance(x := row.get(value), float) and abs(x) < MAX_DRAWN else math.nan for row in rows]
    axes.plot(steps, numbers, label=printable(label), color=color, marker=marker)
  axes.set_title(title, fontsize='medium')
  axes.set_xlabel('step')
  axes.grid(alpha=0.3)
  if any(series):
    for text in axes.legend(fontsize='small').get_texts():
      text.set_parse_math(False)  # names may contain what matplotlib takes for formulas


def image_grid(images: np.ndarray) -> np.ndarray:
  """One picture of images (N, H, W, C) uint8, in rows of `GRID_COLUMNS` with white lines between them."""
  count, height, width, _ = images.shape
  columns = min(count, GRID_COLUMNS)
  rows = -(-count // columns)
  grid = np.full((rows * (height + 2), columns * (width + 2), 3), 255, np.uint8)
  for i, image in enumerate(images):
    top, left = i // columns * (height + 2) + 1, i % columns * (width + 2) + 1
    grid[top : top + height, left : left + width] = image
  return grid
