"""Exact evaluation: every image of a split counted once, whatever the batch and the number of devices."""

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any, Self

import jax
from jax.sharding import Mesh
import numpy as np

from t2t_vit_jax.training.sharding import to_devices

# Batches that may wait for the device: enough to keep it busy, few enough not to fill its memory.
MAX_BATCHES_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Sums over the images of a split."""

  correct: int  # the label is the best guess
  correct_top5: int  # the label is among the five best
  count: int
  loss_sum: float  # cross entropy, without label smoothing
  unreadable: int = 0  # images that could not be read: counted as wrong, with the loss of an even guess

  @property
  def top1(self) -> float:
    return self.correct / self.count

  @property
  def top5(self) -> float:
    return self.correct_top5 / self.count

  @property
  def loss(self) -> float:
    return self.loss_sum / self.count

  def as_dict(self) -> dict[str, Any]:
    """The sums and the figures that follow from them, for JSON."""
    return {**dataclasses.asdict(self), 'top1': self.top1, 'top5': self.top5, 'loss': self.loss}

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> Self:
    """The inverse of `as_dict`."""
    return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})


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
  # float32 holds a batch's counts exactly, but not a large split's: added up as integers.
  return Accuracy(
    correct=sum(int(row['top1']) for row in rows),
    correct_top5=sum(int(row['top5']) for row in rows),
    count=sum(int(row['count']) for row in rows),
    loss_sum=float(sum(np.float64(row['loss']) for row in rows)),
    unreadable=sum(int(row['unreadable']) for row in rows),
  )
