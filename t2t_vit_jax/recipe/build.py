"""The computations of a run, built from its config alone: without data, and for devices that need not be there."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from t2t_vit_jax.data.loader import TrainOrder
from t2t_vit_jax.errors import UserError, check_positive, choose
from t2t_vit_jax.models.preprocessing import Normalization
from t2t_vit_jax.models.t2t_vit import T2TViT
from t2t_vit_jax.models.variants import create_model
from t2t_vit_jax.processes import in_all_processes
from t2t_vit_jax.recipe import optimizer, sharding, steps
from t2t_vit_jax.recipe.augment import BatchAugmentation, Mixing, RandomErasing
from t2t_vit_jax.recipe.checks import check_accumulation
from t2t_vit_jax.recipe.init_from import pretrained_variables
from t2t_vit_jax.recipe.state import TrainState, init_state

DTYPES = {name: jnp.dtype(name) for name in ('float32', 'bfloat16', 'float16')}  # of computation, by `model.dtype`


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The computations of a run on the devices of a mesh, without its data."""

  config: dict[str, Any]  # all fields that it was built from, to be saved and shown
  configured_batch_size: int  # images; `order.batch_size` may be smaller, see `fitting_batch_size`
  mesh: Mesh
  model: T2TViT
  init_from: str | None  # the weight file to start from
  class_names: tuple[str, ...] | None  # of the data, if it is known
  augmentation: BatchAugmentation
  order: TrainOrder
  eval_batch_size: int  # images
  accumulate_steps: int  # parts of a batch that go through the model one by one
  ema_decay: float  # 0 without a moving average of the weights
  total_steps: int
  abstract_state: TrainState  # shapes, dtypes and shardings
  make_state: Callable[..., TrainState]  # (rng, variables=None) -> state, random without variables
  train_step: jax.stages.Wrapped  # (state, batch, rng) -> (state, metrics), see `steps.make_train_step`
  eval_step: jax.stages.Wrapped  # (variables, batch) -> outcome of each image, see `steps.make_eval_step`

  @property
  def num_parameters(self) -> int:
    """Number of trained parameters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(self.abstract_state.params))

  @property
  def channels(self) -> int:
    """Number of channels of the images."""
    return len(self.augmentation.normalization.mean)

  @property
  def images_per_device(self) -> int:
    """Number of images of a training batch on each device."""
    return self.order.batch_size // self.mesh.size

  @functools.cached_property
  def rng(self) -> jax.Array:
    """The run's random key; each step derives its keys from it and the step's number."""
    # Made on the devices: device_put does not reach the devices of other processes.
    return jax.jit(lambda: jax.random.key(self.order.seed), out_shardings=sharding.replicated(self.mesh))()

  def fresh_state(self) -> TrainState:
    """The state before the first step: random, or with the weights of the file `init_from`.

    Raises:
      UserError: the file can't be read, or holds another model.
    """
    if self.init_from is None:
      return self.make_state(self.rng)
    path = self.init_from

    def load() -> dict[str, Any]:
      return pretrained_variables(path, self.model, self.channels, self.order.seed, self.class_names)

    return self.make_state(self.rng, in_all_processes(load))

  def abstract_batch(self, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and sharding of a batch of `count` images."""
    size, batch_sharding = self.model.image_size, sharding.over_batch(self.mesh)
    return {
      'image': jax.ShapeDtypeStruct((count, size, size, self.channels), jnp.uint8, sharding=batch_sharding),
      'label': jax.ShapeDtypeStruct((count,), jnp.int32, sharding=batch_sharding),
      'mask': jax.ShapeDtypeStruct((count,), jnp.float32, sharding=batch_sharding),
    }

  @property
  def abstract_train_arguments(self) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the arguments of `train_step`."""
    rng = jax.eval_shape(lambda: jax.random.key(0))
    rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=sharding.replicated(self.mesh))
    return self.abstract_state, self.abstract_batch(self.order.batch_size), rng


def build_recipe(
  config: Any,
  mesh: Mesh,
  *,
  num_classes: int,
  num_train_images: int,
  class_names: tuple[str, ...] | None = None,
  model: Any = None,
) -> Recipe:
  """Builds the computations of a run; its devices and data need only be described.

  Args:
    config: resolved; see `init_from.resolve`.
    mesh: of devices that are present or only described.
    num_classes: of the data.
    num_train_images: of the data.
    class_names: of the data; None for data that is described only.
    model: another model in place of the config's, to compare with.

  Raises:
    UserError: the parts don't fit together.
  """
  batch_size = fitting_batch_size(config.data, mesh, num_train_images)
  if model is None:
    model = build_model(config, num_classes)
  order = TrainOrder(num_train_images, batch_size, config.seed)
  tx, learning_rate = build_optimizer(config, order)
  augmentation = batch_augmentation(config, model.num_classes, batch_size)
  accumulate_steps = config.optimizer.accumulate_steps
  check_accumulation(accumulate_steps, batch_size // mesh.size, mesh.size, augmentation.mixing.group_size)

  def make_state(rng: jax.Array, variables: Any = None) -> TrainState:
    data, with_ema = config.data, bool(config.ema.decay)
    return init_state(model, tx, rng, data.image_size, channels=data.channels, with_ema=with_ema, variables=variables)

  shapes = jax.eval_shape(lambda: make_state(jax.random.key(0)))  # raises if the model's widths don't fit together
  abstract_state = sharding.divided(shapes, mesh)
  state_shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
  train_step = steps.make_train_step(
    model,
    tx,
    learning_rate,
    augmentation=augmentation,
    ema_decay=config.ema.decay,
    accumulate_steps=accumulate_steps,
    head_only=not config.schedule.backbone_factor,
  )
  return Recipe(
    config=config.to_dict() | {'data': config.data.to_dict() | {'batch_size': batch_size}},
    configured_batch_size=config.data.batch_size,
    mesh=mesh,
    model=model,
    init_from=config.init_from,
    class_names=class_names,
    augmentation=augmentation,
    order=order,
    eval_batch_size=eval_batch_size(config, mesh),
    accumulate_steps=accumulate_steps,
    ema_decay=config.ema.decay,
    total_steps=optimizer.total_steps(config.schedule, order.steps_per_epoch),
    abstract_state=abstract_state,
    make_state=jax.jit(make_state, out_shardings=state_shardings),
    train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, sharding.replicated(mesh))),
    eval_step=make_eval_step(config, mesh, model),
  )


def build_optimizer(config: Any, order: TrainOrder) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer for the batches of `order`, and the learning rate of the head."""
  learning_rate, backbone_learning_rate = (
    optimizer.learning_rate_schedule(
      config.schedule, steps_per_epoch=order.steps_per_epoch, batch_size=order.batch_size, peak_factor=factor
    )
    for factor in (1.0, config.schedule.backbone_factor)
  )
  return optimizer.make_optimizer(config.optimizer, learning_rate, backbone_learning_rate), learning_rate


def build_mesh(config: Any, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of `config.mesh`, of `devices` or of all that are present.

  Raises:
    UserError: the devices don't fit the mesh, or cannot divide a batch evenly.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  sharding.check_batch_size(config.data.batch_size, mesh)
  return mesh


def fitting_batch_size(data: Any, mesh: Mesh, num_train_images: int) -> int:
  """`data.batch_size`, halved until an epoch has `data.min_steps_per_epoch` or devices would no longer divide it.

  The learning rate, which is linear in the batch, follows.
  """
  batch_size: int = data.batch_size
  while num_train_images < batch_size * data.min_steps_per_epoch and batch_size % (2 * mesh.size) == 0:
    batch_size //= 2
  return batch_size


def make_eval_step(config: Any, mesh: Mesh, model: T2TViT) -> jax.stages.Wrapped:
  """The jitted `steps.make_eval_step` for images that are normalised as `config.data` says."""
  step = steps.make_eval_step(model, normalization=normalization(config))
  return jax.jit(step, out_shardings=sharding.over_batch(mesh))


def eval_batch_size(config: Any, mesh: Mesh) -> int:
  """`config.data.eval_batch_size`, rounded up to a multiple of the number of devices: padding is masked out."""
  return math.ceil(config.data.eval_batch_size / mesh.size) * mesh.size


def normalization(config: Any) -> Normalization:
  """Normalization with the mean and std of `config.data`."""
  return Normalization(tuple(config.data.mean), tuple(config.data.std))


def build_model(config: Any, num_classes: int) -> T2TViT:
  """The model of `config.model`; where a field is None, the named variant decides, or `T2TViT` if there is no name.

  Raises:
    UserError: unknown model, dtype or argument.
  """
  arguments = {field: value for field, value in config.model.items() if value is not None}
  name = arguments.pop('name', None)
  arguments.setdefault('num_classes', num_classes)
  arguments['dtype'] = compute_dtype(config)
  arguments['image_size'] = config.data.image_size
  return T2TViT(**arguments) if name is None else create_model(name, **arguments)


def compute_dtype(config: Any) -> Any:
  """The dtype that `config.model.dtype` names.

  Raises:
    UserError: the models cannot compute in it.
  """
  return choose(DTYPES, 'model.dtype', config.model.dtype)


def batch_augmentation(config: Any, num_classes: int, batch_size: int) -> BatchAugmentation:
  """The device's part of `config.augment`, for batches of `batch_size` images.

  Raises:
    UserError: the mixing groups don't divide the batch.
  """
  augment = config.augment
  mixed = augment.mixup_alpha or augment.cutmix_alpha
  check_positive('augment.mixing_group_size', augment.mixing_group_size)
  group_size = min(augment.mixing_group_size, batch_size) if mixed else 1  # a smaller batch is one group
  if batch_size % group_size:
    raise UserError(
      f'augment.mixing_group_size {group_size} does not divide the batch of {batch_size} images: change one of the two'
    )
  mixing = Mixing(augment.mixup_alpha, augment.cutmix_alpha, augment.cutmix_probability, group_size)
  erasing = RandomErasing(
    augment.random_erasing_probability, tuple(augment.random_erasing_area), tuple(augment.random_erasing_aspect_ratio)
  )
  return BatchAugmentation(num_classes, augment.label_smoothing, mixing, normalization(config), erasing)
