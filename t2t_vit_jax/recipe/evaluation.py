"""Exact evaluation: every image of a split counted once, whatever the batch and the number of devices."""

from collections.abc import Callable, Iterable
import contextlib
import dataclasses
import itertools
from typing import Any, Self

import jax
from jax.sharding import Mesh
import numpy as np

from t2t_vit_jax.data.faults import Faults, Remarks
from t2t_vit_jax.data.loader import Share, Workers, eval_batches
from t2t_vit_jax.data.sources import Source
from t2t_vit_jax.data.transforms import EvalTransform
from t2t_vit_jax.errors import csv_line, printable
from t2t_vit_jax.recipe.sharding import to_devices

# Batches that may wait for the device: enough to keep it busy, few enough not to fill its memory.
MAX_BATCHES_IN_FLIGHT = 2
MAX_CLASSES_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Sums over the images of a split."""

  correct: int  # the label is the best guess
  correct_top5: int  # the label is among the five best
  count: int
  loss_sum: float  # cross entropy, without label smoothing
  unreadable: int = 0  # images that could not be read: counted as wrong, with the loss of a uniform guess
  class_correct: tuple[int, ...] = ()  # by label, of the images that could be read; not part of `as_dict`
  class_count: tuple[int, ...] = ()
  class_names: tuple[str, ...] = ()

  @property
  def top1(self) -> float:
    return self.correct / self.count

  @property
  def top5(self) -> float:
    return self.correct_top5 / self.count

  @property
  def loss(self) -> float:
    return self.loss_sum / self.count

  def __str__(self) -> str:
    unreadable = f', {self.unreadable} unreadable' if self.unreadable else ''
    return f'top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, loss {self.loss:.4f} ({self.count} images{unreadable})'

  def last_line(self, split: str) -> str:
    """The last line of a program that ends with this result."""
    return f'{split} top-1 {100 * self.top1:.2f} % ({self.correct}/{self.count})'

  def as_dict(self) -> dict[str, Any]:
    """The sums and the figures that follow from them, for JSON."""
    sums = {name: value for name, value in dataclasses.asdict(self).items() if not name.startswith('class_')}
    return {**sums, 'top1': self.top1, 'top5': self.top5, 'loss': self.loss}

  def class_table(self) -> list[str]:
    """Lines for people, the worst class first, classes without image last; none for more than `MAX_CLASSES_SHOWN`."""
    if not 0 < len(self.class_names) <= MAX_CLASSES_SHOWN:
      return []
    rows = sorted(
      zip(self.class_names, self.class_correct, self.class_count, strict=True),
      key=lambda row: (not row[2], row[1] / max(row[2], 1)),
    )
    names = [printable(name) for name, _, _ in rows]
    width = max(map(len, names))
    return ['accuracy of each class, the worst first:'] + [
      f'  {name:<{width}}  ' + (f'{100 * correct / count:6.2f} % ({correct}/{count})' if count else 'no image')
      for name, (_, correct, count) in zip(names, rows, strict=True)
    ]

  def class_csv(self) -> str:
    """A table for programs, in the order of the labels: label, class, images, correct, top1."""
    lines = [csv_line('label', 'class', 'images', 'correct', 'top1')]
    rows = zip(self.class_names, self.class_correct, self.class_count, strict=True)
    for label, (name, correct, count) in enumerate(rows):
      lines.append(csv_line(label, name, count, correct, f'{correct / count:.4f}' if count else ''))
    return ''.join(lines)

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> Self:
    """The inverse of `as_dict`."""
    return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Evaluates weights of a model on a split.

  Attributes:
    step: see `steps.make_eval_step`.
    source: the split.
    transform: from a decoded image to one of the model's size.
    share: this process's part of each batch.
    workers: processes and threads that prepare its images.
    mesh: the devices.
    split: its name, for messages.
    remarks: on the images.
  """

  step: Callable[[Any, Any], dict[str, jax.Array]]
  source: Source
  transform: EvalTransform
  share: Share
  workers: Workers
  mesh: Mesh
  split: str
  remarks: Remarks = dataclasses.field(default_factory=Remarks)

  def __call__(
    self, weights: dict[str, Any], warn: Callable[[str], None], stop: Callable[[], bool] = lambda: False
  ) -> dict[str, Accuracy]:
    """Accuracy of each of `weights`, variables by name, such as 'raw' and 'ema'.

    Ends early, with the images so far, once `stop` returns True. Images that cannot be read are named to `warn`.

    Raises:
      DataError: a label belongs to no class, or a worker died.
    """
    faults = Faults(self.source, warn, 'it counts as wrong', remarks=self.remarks)
    with contextlib.closing(eval_batches(self.source, self.transform, self.share, self.workers)) as batches:
      until_stop = itertools.takewhile(lambda _: not stop(), faults.check(batches))
      accuracies = evaluate(self.step, weights, until_stop, self.mesh)
    return {kind: dataclasses.replace(each, class_names=self.source.class_names) for kind, each in accuracies.items()}


def evaluate(
  eval_step: Callable[[Any, Any], dict[str, jax.Array]],
  weights: dict[str, Any],
  batches: Iterable[dict[str, np.ndarray]],
  mesh: Mesh,
) -> dict[str, Accuracy]:
  """Runs each set of weights over the same batches, reading the images once.

  Args:
    eval_step: see `steps.make_eval_step`.
    weights: variables by name, such as 'raw' and 'ema'.
    batches: this process's part of the batches, with `mask` 0 for padding.
    mesh: the devices.
  """
  sums: dict[str, list[dict[str, jax.Array]]] = {name: [] for name in weights}
  for batch in batches:
    on_devices = to_devices(batch, mesh)
    for name, variables in weights.items():
      sums[name].append(eval_step(variables, on_devices))
      if len(sums[name]) > MAX_BATCHES_IN_FLIGHT:
        sums[name][-1 - MAX_BATCHES_IN_FLIGHT]['count'].block_until_ready()
  return {name: _total(jax.device_get(rows)) for name, rows in sums.items()}


def _total(rows: list[dict[str, np.ndarray]]) -> Accuracy:
  # Added up as integers: float32 holds a batch's counts exactly, but not a large split's.
  return Accuracy(
    correct=sum(int(row['top1']) for row in rows),
    correct_top5=sum(int(row['top5']) for row in rows),
    count=sum(int(row['count']) for row in rows),
    loss_sum=float(sum(np.float64(row['loss']) for row in rows)),
    unreadable=sum(int(row['unreadable']) for row in rows),
    class_correct=_by_class(rows, 'class_top1'),
    class_count=_by_class(rows, 'class_count'),
  )


def _by_class(rows: list[dict[str, np.ndarray]], name: str) -> tuple[int, ...]:
  sums = np.sum([row[name] for row in rows], axis=0, dtype=np.int64)
  return tuple(int(number) for number in np.atleast_1d(sums)) if rows else ()
