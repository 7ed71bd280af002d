"""Exact evaluation: every image of a split counted once, whatever the batch and the number of devices."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import itertools
from typing import Any, Self

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from t2t_vit_jax.data.faults import CHOSEN, Faults, Remarks
from t2t_vit_jax.data.loader import UNREADABLE, Share, Workers, eval_batches
from t2t_vit_jax.data.sources import Source
from t2t_vit_jax.data.transforms import EvalTransform
from t2t_vit_jax.errors import DataError, csv_line, printable
from t2t_vit_jax.recipe.sharding import to_devices

# Batches that may wait for the device: enough to keep it busy, few enough not to fill its memory.
MAX_BATCHES_IN_FLIGHT = 2
MAX_CLASSES_SHOWN = 20
SEVERAL = -2  # in place of the label of an image that has several


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Sums over the images of a split."""

  correct: int  # the label is the best guess
  correct_top5: int  # the label is among the five best
  count: int
  loss_sum: float  # cross entropy, without label smoothing
  unreadable: int = 0  # images that could not be read: counted as wrong, with the loss of a uniform guess
  left_out: int = 0  # images that do not count: none of their labels is among the classes that are scored
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
    more = ((self.unreadable, 'unreadable'), (self.left_out, 'left out'))
    rest = ''.join(f', {count} {what}' for count, what in more if count)
    return f'top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, loss {self.loss:.4f} ({self.count} images{rest})'

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
class Guesses:
  """What a model says of the images of a split that count, one by one: arrays (N,) in the order of the images."""

  index: np.ndarray  # int64, number of the image in its split
  label: np.ndarray  # int32, `UNREADABLE` for an image that could not be read, `SEVERAL` where several labels are right
  guess: np.ndarray  # int32, the likeliest class
  right: np.ndarray  # bool, whether the guess is a label of the image
  right_top5: np.ndarray  # bool, whether one of the five likeliest classes is
  confidence: np.ndarray  # float32, probability of the guess
  loss: np.ndarray  # float32, see `steps.make_eval_step`
  left_out: int  # images that do not count: none of their labels is among the classes that are scored

  def take(self, chosen: np.ndarray) -> Self:
    """The guesses about some of the images, in the order of their numbers in these arrays."""
    arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != 'left_out'}
    return dataclasses.replace(self, **{name: array[chosen] for name, array in arrays.items()})

  def accuracy(self, class_names: Sequence[str]) -> Accuracy:
    """Sums over the images; `class_names` are one per label."""
    readable = self.label >= 0

    def by_class(chosen: np.ndarray) -> tuple[int, ...]:
      return tuple(np.bincount(self.label[chosen], minlength=len(class_names)).tolist())

    return Accuracy(
      correct=int(self.right.sum()),
      correct_top5=int(self.right_top5.sum()),
      count=len(self.index),
      loss_sum=float(self.loss.sum(dtype=np.float64)),
      unreadable=int((self.label == UNREADABLE).sum()),
      left_out=self.left_out,
      class_correct=by_class(readable & self.right),
      class_count=by_class(readable),
      class_names=tuple(class_names),
    )


def score(
  labels: np.ndarray, best: np.ndarray, confidence: np.ndarray, loss: np.ndarray, classes: Sequence[int] | None = None
) -> Guesses:
  """Compares the likeliest classes of all images with their labels.

  A guess is right if it is any of the image's labels. An image counts if one of its labels is among the classes that
  are scored, or if it could not be read: then it is wrong.

  Args:
    labels: (N,) or (N, K), of which negative ones stand for none, and `UNREADABLE` for an image that cannot be read.
    best: (N, 5) or fewer, labels of the likeliest classes, the likeliest first.
    confidence: (N,), probability of the first.
    loss: (N,)
    classes: labels of the classes that are scored; None for all.
  """
  labels = labels[:, None] if labels.ndim == 1 else labels
  valid = (labels >= 0) & (True if classes is None else np.isin(labels, classes))
  unreadable = (labels == UNREADABLE).any(axis=1)
  (index,) = np.nonzero(valid.any(axis=1) | unreadable)
  hits = ((best[:, :, None] == labels[:, None, :]) & valid[:, None, :]).any(axis=2)  # (N, 5)
  single = np.where(valid.sum(axis=1) == 1, labels[np.arange(len(labels)), valid.argmax(axis=1)], SEVERAL)
  label = np.where(unreadable, UNREADABLE, single)
  return Guesses(
    index=index,
    label=label[index],
    guess=best[index, 0],
    right=hits[index, 0],
    right_top5=hits[index].any(axis=1),
    confidence=confidence[index],
    loss=loss[index],
    left_out=len(labels) - len(index),
  )


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
    classes: labels of the classes that are scored, as in `step`; None for all.
    remarks: on the images.
  """

  step: Callable[[Any, Any], dict[str, jax.Array]]
  source: Source
  transform: EvalTransform
  share: Share
  workers: Workers
  mesh: Mesh
  split: str
  classes: tuple[int, ...] | None = None
  remarks: Remarks = dataclasses.field(default_factory=lambda: Remarks(CHOSEN))

  def __call__(
    self, weights: dict[str, Any], warn: Callable[[str], None], stop: Callable[[], bool] = lambda: False
  ) -> dict[str, Accuracy]:
    """Accuracy of each of `weights`; see `guesses`."""
    guesses = self.guesses(weights, warn, stop)
    return {kind: each.accuracy(self.source.class_names) for kind, each in guesses.items()}

  def guesses(
    self,
    weights: dict[str, Any],
    warn: Callable[[str], None],
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], object] = lambda number: None,
  ) -> dict[str, Guesses]:
    """Guesses with each of `weights`, variables by name, such as 'raw' and 'ema'; reads the images once.

    Ends early, with the images so far, once `stop` returns True. Images that cannot be read are named to `warn`.
    `progress` gets the number of images of each batch that was read.

    Raises:
      DataError: no image can be read, a label belongs to no class, or a worker died.
    """
    faults = Faults(self.source, warn, 'it counts as wrong', remarks=self.remarks)

    with contextlib.closing(eval_batches(self.source, self.transform, self.share, self.workers)) as batches:
      until_stop = itertools.takewhile(lambda _: not stop(), faults.check(batches))
      outcomes, labels = run_batches(self.step, weights, self._counted(until_stop, progress), self.mesh)
    length = min(len(self.source), len(labels))  # the rest is padding
    if length == len(self.source) and (labels[:length] == UNREADABLE).all():
      raise DataError(f'no image of {self.source.description} can be read')
    return {
      name: score(labels[:length], **{key: array[:length] for key, array in outcome.items()}, classes=self.classes)
      for name, outcome in outcomes.items()
    }

  def _counted(self, batches: Iterable[Any], progress: Callable[[int], object]) -> Iterator[Any]:
    for number, batch in enumerate(batches):
      yield batch
      progress(min(self.share.batch_size, len(self.source) - number * self.share.batch_size))


def run_batches(
  eval_step: Callable[[Any, Any], dict[str, jax.Array]],
  weights: dict[str, Any],
  batches: Iterable[dict[str, np.ndarray]],
  mesh: Mesh,
) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
  """Runs each set of weights over the same batches.

  Args:
    eval_step: see `steps.make_eval_step`.
    weights: variables by name.
    batches: this process's part of the batches.
    mesh: the devices.

  Returns:
    What `eval_step` says of all images, in their order and with the padding, by name of the weights; and their labels.
  """
  labels: list[np.ndarray] = []
  rows: dict[str, list[Any]] = {name: [] for name in weights}
  for batch in batches:
    on_devices = to_devices({'image': batch['image'], 'label': batch['label']}, mesh)
    labels.append(batch['label'])
    for name, variables in weights.items():
      rows[name].append(eval_step(variables, on_devices))
      if len(rows[name]) > MAX_BATCHES_IN_FLIGHT:
        rows[name][-1 - MAX_BATCHES_IN_FLIGHT] = jax.tree.map(_own_rows, rows[name][-1 - MAX_BATCHES_IN_FLIGHT])
  if not labels:
    nothing = {
      'best': np.zeros((0, 1), np.int32),
      'confidence': np.zeros(0, np.float32),
      'loss': np.zeros(0, np.float32),
    }
    return dict.fromkeys(weights, nothing), np.zeros(0, np.int32)
  own = [{key: np.stack([_own_rows(row[key]) for row in each]) for key in each[0]} for each in rows.values()]
  *outcomes, all_labels = _in_order([*own, np.stack(labels)])
  return dict(zip(weights, outcomes, strict=True)), all_labels


def _own_rows(x: jax.Array | np.ndarray) -> np.ndarray:
  """The rows of a batch that this process's devices hold, in order."""
  if not isinstance(x, jax.Array) or x.is_fully_addressable:
    return np.asarray(x)
  shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
  return np.concatenate([np.asarray(shard.data) for shard in shards])


def _in_order(tree: Any) -> Any:
  """Arrays of the rows of all processes: (batches, rows of this process, ...) -> (batches * rows of all, ...)."""
  if jax.process_count() > 1:
    tree = jax.tree.map(lambda x: np.moveaxis(x, 0, 1), multihost_utils.process_allgather(tree))
    tree = jax.tree.map(lambda x: x.reshape(len(x), -1, *x.shape[3:]), tree)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
