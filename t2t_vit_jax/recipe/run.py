"""A recipe with its data, built and checked from a config before anything is written or computed."""

from collections.abc import Callable, Generator
import contextlib
import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import joblib
import numpy as np

from t2t_vit_jax.data import loader, pipeline, transforms
from t2t_vit_jax.data.decoding import ORIENTATIONS
from t2t_vit_jax.data.faults import Faults
from t2t_vit_jax.data.sources import Source
from t2t_vit_jax.data.worker_count import default_num_workers
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.t2t_vit import T2TViT
from t2t_vit_jax.processes import check_agreement, in_all_processes, processes_on_this_host
from t2t_vit_jax.recipe import steps
from t2t_vit_jax.recipe.augment import BatchAugmentation
from t2t_vit_jax.recipe.build import Recipe, build_mesh, build_recipe, eval_batch_size
from t2t_vit_jax.recipe.evaluation import Accuracy, Evaluator
from t2t_vit_jax.recipe.init_from import resolve
from t2t_vit_jax.recipe.state import TrainState

SAMPLE_IMAGES = 32


@dataclasses.dataclass(frozen=True)
class Run:
  """A recipe with its data, ready to be used."""

  recipe: Recipe
  train_source: Source
  train_transform: transforms.TrainTransform
  max_bad_fraction: float  # of training images that may be unreadable
  workers: loader.Workers
  workers_note: str  # why there are so many
  evaluator: Evaluator

  @property
  def orientation(self) -> str:
    """The value of `data.orientation`."""
    return str(self.recipe.config['data']['orientation'])

  def with_orientation(self, orientation: str) -> Self:
    """The same run with another `data.orientation`."""
    config, upright = self.recipe.config, ORIENTATIONS[orientation]
    config = config | {'data': config['data'] | {'orientation': orientation}}
    return dataclasses.replace(
      self,
      recipe=dataclasses.replace(self.recipe, config=config),
      train_source=dataclasses.replace(self.train_source, upright=upright),
      evaluator=dataclasses.replace(self.evaluator, source=dataclasses.replace(self.evaluator.source, upright=upright)),
    )

  def train_faults(self, warn: Callable[[str], None]) -> Faults:
    """The checker for the batches of `train_batches`."""
    return Faults(
      self.train_source, warn, 'the next one takes its place', self.max_bad_fraction, self.evaluator.remarks
    )

  def train_batches(self, first_step: int, workers: loader.Workers | None = None) -> Generator[loader.Batch]:
    """This process's part of the batches from `first_step` to the end of the run, unchecked."""
    return loader.train_batches(
      self.train_source,
      self.train_transform,
      self.recipe.order,
      _share(self.recipe.order.batch_size),
      workers or self.workers,
      first_step=first_step,
      last_step=self.recipe.total_steps,
    )

  def batch_of(self, step: int) -> loader.Batch:
    """Rebuilds this process's part of the batch of step `step`, unchecked."""
    with contextlib.closing(self.train_batches(step - 1, loader.Workers(num_workers=0))) as batches:
      return next(batches)

  def augmented(self, batch: loader.Batch, step: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Replays the augmentation of step `step` for `batch`, all or the first images of this process's part.

    Returns:
      Normalised images (B, H, W, C), and the keys of the model's random layers for the first micro-batch.
    """
    order = self.recipe.order
    share = _share(order.batch_size)
    first = share.process_index * share.local_batch_size
    return _augmented(self.recipe.augmentation, order.seed, step - 1, first, batch['image'], batch['label'])

  def sample(self, batch: loader.Batch) -> loader.Batch:
    """The first images of a batch: whole mixing groups, so that every image has its partner."""
    group_size = self.recipe.augmentation.mixing.group_size
    return {name: array[: group_size * math.ceil(SAMPLE_IMAGES / group_size)].copy() for name, array in batch.items()}

  def pictures(self, batch: loader.Batch, step: int) -> np.ndarray:
    """The first images that `augmented` gives, as pictures (N, H, W, C) uint8."""
    images, normalization = self.augmented(batch, step)[0][:SAMPLE_IMAGES], self.recipe.augmentation.normalization
    pixels = 255 * (np.asarray(images) * np.array(normalization.std) + np.array(normalization.mean))
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)

  def evaluate(
    self, state: TrainState, warn: Callable[[str], None], stop: Callable[[], bool] = lambda: False
  ) -> dict[str, Accuracy]:
    """Accuracy of the weights ('raw') and of their moving average ('ema'), where there is one; see `Evaluator`."""
    weights = {'raw': state.variables()}
    if self.recipe.ema_decay:
      weights['ema'] = state.variables(state.ema)
    return self.evaluator(weights, warn, stop)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _augmented(
  augmentation: BatchAugmentation, seed: int, step: int, first: int, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """See `Run.augmented`; `first` is the position of the first image in the batch of all processes."""
  augmentation_rng, dropout_rng = steps.step_keys(jax.random.key(seed), step)
  images, _ = augmentation(augmentation_rng, images, labels, first + jnp.arange(len(labels)))
  return images, {'dropout': jax.random.fold_in(dropout_rng, 0)}


def build_run(config: Any) -> Run:
  """Builds everything that `config` names; all processes of a run call this.

  Raises:
    UserError: a field is out of range, data is missing, the parts don't fit together, or processes differ.
  """
  config = in_all_processes(lambda: resolve(config))
  check_agreement(config)
  processes_here = processes_on_this_host()
  return in_all_processes(lambda: _build(config, processes_here))


def _build(config: Any, processes_here: int) -> Run:
  mesh, train_transform = build_mesh(config), pipeline.train_transform(config)  # first: data may take long to open
  train_source, eval_source = pipeline.open_sources(config.data)
  class_names = train_source.class_names
  if len(class_names) < 2:
    raise UserError(f'{train_source.description} has only one class, {class_names[0]!r}: a folder for each is expected')
  if train_source.num_labels > 1:
    raise UserError(f'{train_source.description} has several labels for an image: it is for evaluation alone')
  recipe = build_recipe(
    config, mesh, num_classes=len(class_names), num_train_images=len(train_source), class_names=class_names
  )
  workers, note = choose_workers(config.data, recipe.order.batch_size // jax.process_count(), processes_here)
  return Run(
    recipe=recipe,
    train_source=train_source,
    train_transform=train_transform,
    max_bad_fraction=config.data.max_bad_fraction,
    workers=workers,
    workers_note=note,
    evaluator=make_evaluator(config, mesh, recipe.model, recipe.eval_step, eval_source, workers),
  )


def make_evaluator(
  config: Any,
  mesh: Mesh,
  model: T2TViT,
  eval_step: Callable[..., dict[str, jax.Array]],
  source: Source,
  workers: loader.Workers,
) -> Evaluator:
  """Builds the `Evaluator` of `model` on `source`; `config.data` decides about images and batches.

  Raises:
    UserError: model and source have different numbers of classes, or a field of the transform is wrong.
  """
  if model.num_classes != len(source.class_names):
    raise UserError(
      f'the model has {model.num_classes} classes, but {source.description} has {len(source.class_names)}'
    )
  return Evaluator(
    step=eval_step,
    source=source,
    transform=pipeline.eval_transform(config),
    share=_share(eval_batch_size(config, mesh)),
    workers=workers.for_images(len(source) // jax.process_count()),
    mesh=mesh,
    split=config.data.eval_split,
  )


def _share(batch_size: int) -> loader.Share:
  return loader.Share(batch_size, jax.process_index(), jax.process_count())


def choose_workers(data: Any, local_batch_size: int, processes_here: int) -> tuple[loader.Workers, str]:
  """Data workers as `data.num_workers` says, or by processors and memory; and a phrase about their number.

  Args:
    data: fields `num_workers`, `num_threads` and `image_size`, as `config.data` has them.
    local_batch_size: images of a batch in this process.
    processes_here: number of processes of the run on this host.
  """
  if data.num_workers is not None:
    return loader.Workers(data.num_workers, data.num_threads), 'as data.num_workers says'

  def shared_bytes(number: int) -> float:
    return loader.Workers(number).shared_bytes(local_batch_size, 3 * data.image_size**2)

  number, reason = default_num_workers(processes_here, shared_bytes)
  threads = data.num_threads if number else max(data.num_threads, joblib.cpu_count() // processes_here)
  return loader.Workers(number, threads), reason
