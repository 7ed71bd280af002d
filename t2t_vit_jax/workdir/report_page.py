"""`report.png`: a run's curves and some images as the network saw them, on one page."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from t2t_vit_jax.conversion.files import write_file

if TYPE_CHECKING:
  from matplotlib.axes import Axes

GRID_COLUMNS = 8
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
  """
  rows = [json.loads(line) for line in (Path(workdir) / 'metrics.jsonl').read_text().splitlines()]
  trained = [row for row in rows if row['kind'] == 'train']
  evaluated: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    if 'weights' in row:
      evaluated.setdefault(f'{row["kind"]} {row["weights"]}', []).append(row)

  from matplotlib.figure import Figure  # late: it takes half a second, and every process of a run would wait for it

  figure = Figure(figsize=(12, 8), layout='constrained')  # without pyplot: no display, no global state
  figure.suptitle(title)
  curves, sample = figure.subfigures(2, 1, squeeze=False).flat
  loss, accuracy, rate = curves.subplots(1, 3)
  _curve(loss, 'loss', {'train, with augmentation': trained} | evaluated, 'loss')
  _curve(accuracy, 'top-1 accuracy', evaluated, 'top1')
  _curve(rate, 'learning rate', {'': trained}, 'learning_rate')
  axes = sample.subplots()
  axes.imshow(image_grid(images), interpolation='nearest')
  axes.set_title('training images as the network saw them', fontsize='medium')
  axes.axis('off')
  file = Path(workdir) / 'report.png'
  write_file(file, lambda temporary: figure.savefig(temporary, format='png', dpi=100))
  return file


def _curve(axes: 'Axes', title: str, series: dict[str, list[dict[str, Any]]], value: str) -> None:
  for label, rows in series.items():
    steps = [row['step'] for row in rows]
    color = COLORS.get(label.split()[-1] if label else '', 'C0')
    marker = '.' if len(rows) < 30 else ''
    axes.plot(steps, [row[value] for row in rows], label=label, color=color, marker=marker)
  axes.set_title(title, fontsize='medium')
  axes.set_xlabel('step')
  axes.grid(alpha=0.3)
  if any(series):
    axes.legend(fontsize='small')


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
