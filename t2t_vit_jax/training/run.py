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

from t2t_vit_jax.conversion import load_pretrained
from t2t_vit_jax.data import loader, transforms
from t2t_vit_jax.data.faults import Faults
from t2t_vit_jax.data.sources import Source
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.t2t_vit import T2TViT
from t2t_vit_jax.models.variants import create_model
from t2t_vit_jax.training import inputs, optimizer, sharding, steps
from t2t_vit_jax.training.augment import BatchAugmentation, Mixing, Normalization, RandomErasing
from t2t_vit_jax.training.config_checks import check_accumulation, check_ranges
from t2t_vit_jax.training.evaluation import Accuracy, Evaluator
from t2t_vit_jax.training.state import TrainState, init_state

SAMPLE_IMAGES = 32
DTYPES = ('float32', 'bfloat16', 'float16')


@dataclasses.dataclass(frozen=True)
class Run:
  """The parts of a run, ready to be used. `config` is the whole of `configs/default.py`."""

  config: Any
  mesh: Mesh
  model: T2TViT
  train_source: Source
  train_transform: transforms.TrainTransform
  augmentation: BatchAugmentation
  order: loader.TrainOrder
  total_steps: int
  abstract_state: TrainState  # shapes, dtypes and shardings
  make_state: Callable[..., TrainState]  # from the run's rng, and variables if they are not to be random
  train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  evaluator: Evaluator

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
    return self.make_state(self.rng, pretrained_variables(self.config.init_from, self.model, self.config.seed))

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
    num_parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(self.abstract_state.params))
    evaluated = self.evaluator.source
    return [
      f'model: {self.config.model.name}, {num_parameters:,} trained parameters, {self.config.model.dtype}',
      f'train: {self.train_source.description}, {len(self.train_source):,} images',
      f'evaluation: {evaluated.description}, {len(evaluated):,} images',
      f'steps: {self.total_steps:,} of {self.order.batch_size} images, {self.order.steps_per_epoch:,} an epoch, '
      f'on {self.mesh.size} {jax.default_backend()} device(s)',
    ]

  @property
  def description(self) -> dict[str, Any]:
    """What is saved with each checkpoint, as JSON."""
    return {
      'model': self.config.model.name,
      'config': self.config.to_dict(),
      'train_images': len(self.train_source),
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
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch_size(config.data.batch_size, mesh)
  train_source, eval_source = inputs.open_sources(config.data)
  model = build_model(config, num_classes=len(train_source.class_names))
  order = loader.TrainOrder(len(train_source), config.data.batch_size, config.seed)
  backbone_factor = config.schedule.backbone_factor
  learning_rate, backbone_learning_rate = (
    optimizer.learning_rate_schedule(
      config.schedule, steps_per_epoch=order.steps_per_epoch, batch_size=order.batch_size, peak_factor=factor
    )
    for factor in (1.0, backbone_factor)
  )
  tx = optimizer.make_optimizer(config.optimizer, learning_rate, backbone_learning_rate)
  normalization = Normalization(tuple(config.data.mean), tuple(config.data.std))
  augmentation = batch_augmentation(config, model.num_classes, normalization)
  check_accumulation(config, mesh.size, augmentation.mixing.group_size)
  replicated = sharding.replicated(mesh)

  def make_state(rng: jax.Array, variables: Any = None) -> TrainState:
    return init_state(model, tx, rng, config.data.image_size, with_ema=bool(config.ema.decay), variables=variables)

  shapes = jax.eval_shape(make_state, jax.random.key(0))  # raises if the model's widths don't fit together
  return Run(
    config=config,
    mesh=mesh,
    model=model,
    train_source=train_source,
    train_transform=inputs.train_transform(config),
    augmentation=augmentation,
    order=order,
    total_steps=optimizer.total_steps(config.schedule, order.steps_per_epoch),
    abstract_state=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), shapes),
    make_state=jax.jit(make_state, out_shardings=replicated),
    train_step=jax.jit(
      steps.make_train_step(
        model,
        tx,
        learning_rate,
        augmentation=augmentation,
        ema_decay=config.ema.decay,
        accumulate_steps=config.optimizer.accumulate_steps,
        head_only=not backbone_factor,
      ),
      donate_argnums=0,
      out_shardings=replicated,
    ),
    evaluator=make_evaluator(config, mesh, model, eval_source),
  )


def make_evaluator(config: Any, mesh: Mesh, model: T2TViT, source: Source) -> Evaluator:
  """Evaluates weights of `model` on `source`, with images and batches as `config.data` has them.

  Raises:
    UserError: model and source have different numbers of classes, or a transform's field is wrong.
  """
  if model.num_classes != len(source.class_names):
    raise UserError(
      f'the model has {model.num_classes} classes, but {source.description} has {len(source.class_names)}'
    )
  # Rounded up to what the devices divide: padding is masked out.
  batch_size = math.ceil(config.data.eval_batch_size / mesh.size) * mesh.size
  normalization = Normalization(tuple(config.data.mean), tuple(config.data.std))
  return Evaluator(
    step=jax.jit(steps.make_eval_step(model, normalization=normalization), out_shardings=sharding.replicated(mesh)),
    source=source,
    transform=inputs.eval_transform(config),
    share=_share(batch_size),
    workers=_workers(config),
    mesh=mesh,
  )


def build_model(config: Any, num_classes: int) -> T2TViT:
  """The model of `config.model`; fields that are None stay as the named variant has them.

  Raises:
    UserError: unknown model, dtype or argument.
  """
  arguments = {field: value for field, value in config.model.items() if value is not None}
  name = arguments.pop('name')
  arguments.setdefault('num_classes', num_classes)
  arguments['dtype'] = compute_dtype(config)
  return create_model(name, image_size=config.data.image_size, **arguments)


def compute_dtype(config: Any) -> Any:
  """The dtype that `config.model.dtype` names.

  Raises:
    UserError: it names none that the models compute in.
  """
  if config.model.dtype not in DTYPES:
    raise UserError(f'model.dtype must be {" or ".join(map(repr, DTYPES))}, not {config.model.dtype!r}')
  return jnp.dtype(config.model.dtype)


# What two models must share for the weights of one to mean the same in the other.
ARCHITECTURE = (
  'tokens_type',
  'embed_dim',
  'depth',
  'num_heads',
  'mlp_ratio',
  'qkv_bias',
  'qk_scale',
  'token_dim',
  'block_type',
  'dense_stages',
  'growth_rate',
)


def pretrained_variables(path: str, model: T2TViT, seed: int) -> dict[str, Any]:
  """Variables of a file that `load_pretrained` reads, for `model`: with its head and its image size.

  A head of another number of classes is made anew, from `seed`.

  Raises:
    UserError: the file can't be read, or holds another model.
  """
  settings = {'num_heads': model.num_heads} | ({} if model.qk_scale is None else {'qk_scale': model.qk_scale})
  loaded, variables = load_pretrained(path, model.num_classes, model.image_size, settings=settings, seed=seed)
  wrong = [
    f'{field}={getattr(loaded, field)} instead of {getattr(model, field)}'
    for field in ARCHITECTURE
    if getattr(loaded, field) != getattr(model, field)
  ]
  if wrong:
    raise UserError(f'init_from: {path} holds another model than the config: {", ".join(wrong)}')
  return variables


def batch_augmentation(config: Any, num_classes: int, normalization: Normalization) -> BatchAugmentation:
  """The device's part of `config.augment`.

  Raises:
    UserError: the mixing groups don't divide the batch.
  """
  augment = config.augment
  batch_size = config.data.batch_size
  mixed = augment.mixup_alpha or augment.cutmix_alpha
  group_size = min(augment.mixing_group_size, batch_size) if mixed else 1  # a smaller batch is one group
  if batch_size % group_size:
    raise UserError(f'augment.mixing_group_size {group_size} does not divide the batch of {batch_size} images')
  mixing = Mixing(augment.mixup_alpha, augment.cutmix_alpha, augment.cutmix_probability, group_size)
  erasing = RandomErasing(
    augment.random_erasing_probability, tuple(augment.random_erasing_area), tuple(augment.random_erasing_aspect_ratio)
  )
  return BatchAugmentation(num_classes, augment.label_smoothing, mixing, normalization, erasing)


def _share(batch_size: int) -> loader.Share:
  return loader.Share(batch_size, jax.process_index(), jax.process_count())


def _workers(config: Any) -> loader.Workers:
  return loader.Workers(config.data.num_workers, config.data.num_threads)
