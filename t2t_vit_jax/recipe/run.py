"""What a config describes, built and checked before anything is written or computed."""

from collections.abc import Callable, Generator
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from t2t_vit_jax.data import loader, pipeline, transforms
from t2t_vit_jax.data.faults import Faults
from t2t_vit_jax.data.sources import Source
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.t2t_vit import T2TViT
from t2t_vit_jax.processes import together
from t2t_vit_jax.recipe import sharding, steps
from t2t_vit_jax.recipe.build import Programs, build_model, build_programs, eval_batch_size, pretrained_variables
from t2t_vit_jax.recipe.checks import check_ranges
from t2t_vit_jax.recipe.evaluation import Accuracy, Evaluator
from t2t_vit_jax.recipe.state import TrainState

SAMPLE_IMAGES = 32


@dataclasses.dataclass(frozen=True)
class Run(Programs):
  """Programs with their data, ready to be used."""

  train_source: Source
  train_transform: transforms.TrainTransform
  evaluator: Evaluator
  notes: tuple[str, ...] = ()  # in what it differs from its config, for the user

  @functools.cached_property
  def rng(self) -> jax.Array:
    """The run's random key; steps derive theirs from it by number."""
    # Made on the devices: device_put does not reach those of other processes.
    return jax.jit(lambda: jax.random.key(self.config.seed), out_shardings=sharding.replicated(self.mesh))()

  def fresh_state(self) -> TrainState:
    """The state before the first step: random, or with the weights of `config.init_from`.

    Raises:
      UserError: they can't be read, or are another model's.
    """
    if self.config.init_from is None:
      return self.make_state(self.rng)
    variables = together(lambda: pretrained_variables(self.config.init_from, self.model, self.config.seed))
    return self.make_state(self.rng, variables)

  def train_faults(self, warn: Callable[[str], None]) -> Faults:
    """Checks training batches; see `train_batches`."""
    return Faults(self.train_source, warn, 'the next one takes its place', self.config.data.max_bad_fraction)

  def train_batches(self, first_step: int, workers: loader.Workers | None = None) -> Generator[loader.Batch]:
    """This process's part of the batches from `first_step` to the end of the run, unchecked."""
    return loader.train_batches(
      self.train_source,
      self.train_transform,
      self.order,
      _share(self.order.batch_size),
      workers or _workers(self.config),
      first_step=first_step,
      last_step=self.total_steps,
    )

  def augmented(self, batch: loader.Batch, step: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the model got in step number `step` for images of this process's part of its batch, from the first on.

    Returns:
      Normalised images (B, H, W, 3), and the keys of its random layers (of the first micro-batch).
    """
    augmentation_rng, dropout_rng = steps.step_keys(jax.random.key(self.config.seed), step - 1)
    share = _share(self.order.batch_size)
    positions = share.process_index * share.local_batch_size + jnp.arange(len(batch['label']))
    images, _ = jax.jit(self.augmentation)(augmentation_rng, batch['image'], batch['label'], positions)
    return images, {'dropout': jax.random.fold_in(dropout_rng, 0)}

  def sample(self, batch: loader.Batch) -> loader.Batch:
    """The first images of a batch: whole mixing groups, so that every image has its partner."""
    group_size = self.augmentation.mixing.group_size
    return {name: array[: group_size * math.ceil(SAMPLE_IMAGES / group_size)].copy() for name, array in batch.items()}

  def pictures(self, batch: loader.Batch, step: int) -> np.ndarray:
    """Some images of `augmented` for people, (N, H, W, 3) uint8."""
    images, data = self.augmented(batch, step)[0][:SAMPLE_IMAGES], self.config.data
    pixels = 255 * (np.asarray(images) * np.array(data.std) + np.array(data.mean))
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)

  def summary(self) -> list[str]:
    """What the run is, a line for each part."""
    evaluated = self.evaluator.source
    return [
      f'model: {_model_name(self.config)}, {self.num_parameters:,} trained parameters, {self.config.model.dtype}',
      f'train: {self.train_source.description}, {len(self.train_source):,} images',
      f'evaluation: {evaluated.description}, {len(evaluated):,} images',
      f'steps: {self.total_steps:,} of {self.order.batch_size} images, {self.order.steps_per_epoch:,} an epoch, '
      f'on {self.mesh.size} {jax.default_backend()} device(s)',
      f'mesh: data {self.mesh.shape["data"]} x fsdp {self.mesh.shape["fsdp"]}; each device has '
      f'{self.images_per_device} images of a batch and '
      f'{sharding.bytes_per_device(self.abstract_state) / 1e6:,.1f} MB of state',
      *self.mixing_note(),
      *self.notes,
    ]

  def title(self, accuracy: Accuracy) -> str:
    """Of a page about the run's result."""
    return f'{_model_name(self.config)}, {self.config.data.eval_split} {accuracy}'

  def mixing_note(self) -> list[str]:
    """A line about what it costs if images are mixed with some on other devices."""
    share, group_size = self.images_per_device, self.augmentation.mixing.group_size
    if share % group_size == 0:
      return []
    megabytes = share * 3 * self.config.data.image_size**2 / 1e6
    return [
      f'mixing: groups of {group_size} images do not fit the {share} images of a device, so devices exchange pixels: '
      f'each gets up to {megabytes:.1f} MB a step; results do not change'
    ]

  @property
  def description(self) -> dict[str, Any]:
    """What is saved with each checkpoint, as JSON."""
    return {
      'model': _model_name(self.config),
      'config': self.config.to_dict(),
      'train_images': len(self.train_source),
      'eval_part': self.evaluator.source.part,
      'class_names': self.train_source.class_names,
    }

  def evaluate(
    self, state: TrainState, warn: Callable[[str], None] = print, stop: Callable[[], bool] = lambda: False
  ) -> dict[str, Accuracy]:
    """Accuracy of the weights ('raw') and of their moving average ('ema'), where there is one; see `Evaluator`."""
    weights = {'raw': state.variables()}
    if self.config.ema.decay:
      weights['ema'] = state.variables(state.ema)
    return self.evaluator(weights, warn, stop)


def build_run(config: Any) -> Run:
  """Builds everything that `config` names.

  Raises:
    UserError: a field is out of range, data is missing, or the parts don't fit together.
  """
  check_ranges(config)
  if config.model.name:
    build_model(config, num_classes=1)  # says that there is no such model before data is prepared
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch_size(config.data.batch_size, mesh)
  train_source, eval_source = pipeline.open_sources(config.data)
  programs = build_programs(config, mesh, num_classes=len(train_source.class_names), num_train_images=len(train_source))
  asked, found = config.data.batch_size, programs.order.batch_size
  return Run(
    **vars(programs),
    notes=() if found == asked else (f'batch: {found} images, not {asked}, so that an epoch has more steps',),
    train_source=train_source,
    train_transform=pipeline.train_transform(programs.config),
    evaluator=make_evaluator(programs.config, mesh, programs.model, programs.eval_step, eval_source),
  )


def make_evaluator(
  config: Any, mesh: Mesh, model: T2TViT, eval_step: Callable[..., dict[str, jax.Array]], source: Source
) -> Evaluator:
  """Evaluates weights of `model` on `source`, with images and batches as `config.data` has them.

  Raises:
    UserError: model and source have different numbers of classes, or a transform's field is wrong.
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
    workers=_workers(config),
    mesh=mesh,
  )


def _model_name(config: Any) -> str:
  return config.model.name or 'a model without a name'


def _share(batch_size: int) -> loader.Share:
  return loader.Share(batch_size, jax.process_index(), jax.process_count())


def _workers(config: Any) -> loader.Workers:
  return loader.Workers(config.data.num_workers, config.data.num_threads)
