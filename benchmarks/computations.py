"""Computations to measure: forward pass, loss with gradients, and whole training step, for data or descriptions."""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from benchmarks import common
from benchmarks.yardstick import ViT
from configs import default
from t2t_vit_jax.command_line import positive
from t2t_vit_jax.errors import UserError, did_you_mean
from t2t_vit_jax.models.variants import create_model, get_variant
from t2t_vit_jax.recipe import sharding
from t2t_vit_jax.recipe.build import DTYPES, Recipe, build_recipe
from t2t_vit_jax.recipe.init_from import resolve

YARDSTICK = 'ViT-S/16'
IMAGENET: dict[str, Any] = dict(num_classes=1000, num_train_images=1_281_167)
FORMS: dict[str, dict[str, Any]] = {
  'literal': dict(soft_split_form='patches', token_attention_form='full'),
  'default': {},
  'remat': dict(remat='nothing_saveable'),
  'scan_blocks': dict(scan_blocks=True),
}


@dataclasses.dataclass(frozen=True)
class Workload:
  """A model, computed in one way, and what it is given.

  Attributes:
    model: its name.
    batch_size: images.
    image_size: px, height and width.
    dtype: of the computation.
    fields: T2TViT's, in place of the named model's.
  """

  model: str
  batch_size: int
  image_size: int
  dtype: str
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def jax_dtype(self) -> Any:
    """The dtype itself."""
    return jnp.dtype(self.dtype)


OWN_FIELDS = ('model', 'batch_size', 'image_size', 'dtype')  # that a form may change as well


def add_arguments(parser: argparse.ArgumentParser, *, batch_size: int, dtype: str, forms: bool = True) -> None:
  """Adds model, batch, image size, dtype, and forms if there may be several."""
  parser.add_argument('--model', default='t2t_vit_14', help='default %(default)s')
  parser.add_argument('--batch-size', type=positive, default=batch_size, help='images (default %(default)s)')
  parser.add_argument('--image-size', type=positive, help="px, height and width (default: the model's)")
  parser.add_argument('--dtype', choices=DTYPES, default=dtype, help='of computation (default %(default)s)')
  if not forms:
    return
  parser.add_argument(
    '--form',
    action='append',
    metavar='NAME:FIELD=VALUE,...',
    help="may be given often: a way to compute the model, by T2TViT's fields, such as half:depth=7,remat=none; "
    f'{", ".join(OWN_FIELDS)} may differ too. Known by name: {", ".join(FORMS)}',
  )


def workloads(
  arguments: argparse.Namespace, default_forms: Sequence[str] = tuple(FORMS), *, check: bool = True
) -> dict[str, Workload]:
  """The workloads that the arguments of `add_arguments` ask for, by the name of their form.

  Args:
    arguments: the command line.
    default_forms: names in `FORMS`, where the command line has none.
    check: also that the models take such images, for which JAX needs its devices.

  Raises:
    UserError: something about one is unknown or does not fit together.
  """
  workloads = {}
  for name, form in common.forms(arguments.form, FORMS, default_forms).items():
    own = {field: form.get(field, getattr(arguments, field)) for field in OWN_FIELDS}
    own['image_size'] = own['image_size'] or get_variant(own['model']).data.image_size
    if own['dtype'] not in DTYPES:
      raise UserError(f'--form={name}: unknown dtype {own["dtype"]!r}: {did_you_mean(str(own["dtype"]), DTYPES)}')
    fields = {field: value for field, value in form.items() if field not in OWN_FIELDS}
    workloads[name] = Workload(**own, fields=fields)
    model = build_model(workloads[name])
    if check:
      variables_of(model, workloads[name])  # says what is wrong before anything is measured
  return workloads


def build_model(workload: Workload) -> Any:
  """A T2T-ViT.

  Raises:
    UserError: unknown model or field, or fields that don't fit together.
  """
  return create_model(workload.model, image_size=workload.image_size, dtype=workload.jax_dtype, **workload.fields)


def build_yardstick(workload: Workload) -> ViT:
  """The plain ViT, whatever the workload's model.

  Raises:
    UserError: its patches don't divide the images.
  """
  if workload.image_size % ViT.patch_size:
    raise UserError(f'{YARDSTICK} needs images of a multiple of {ViT.patch_size} px, not {workload.image_size}')
  return ViT(image_size=workload.image_size, dtype=workload.jax_dtype)


def describe(tree: Any, where: Any = None) -> Any:
  """Shapes and dtypes of arrays, on the devices of the sharding `where`."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def variables_of(model: Any, workload: Workload, where: Any = None) -> Any:
  """Descriptions of a model's variables.

  Raises:
    UserError: the model does not take such images.
  """
  size = workload.image_size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return describe(jax.eval_shape(model.init, jax.random.key(0), images), where)


def images_of(workload: Workload, where: Any = None) -> jax.ShapeDtypeStruct:
  """Description of a batch of normalised images."""
  size = workload.image_size
  return jax.ShapeDtypeStruct((workload.batch_size, size, size, 3), jnp.float32, sharding=where)


def labels_of(workload: Workload, where: Any = None) -> jax.ShapeDtypeStruct:
  """Description of their classes."""
  return jax.ShapeDtypeStruct((workload.batch_size,), jnp.int32, sharding=where)


def forward(model: Any, variables: Any, images: Any) -> Any:
  """Logits, as in evaluation."""
  return model.apply(variables, images)


def value_and_grad(model: Any, variables: Any, images: Any, labels: Any) -> Any:
  """Mean cross entropy and its gradients with respect to the parameters; nothing is dropped."""

  def loss(params: Any) -> Any:
    logits = model.apply({**variables, 'params': params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  return jax.value_and_grad(loss)(variables['params'])


def jitted(function: Any, model: Any, where: Any = None) -> Any:
  """`forward` or `value_and_grad` of a model as one program."""
  named = functools.partial(function, model)
  return jax.jit(functools.update_wrapper(named, function), out_shardings=where)


def compile_to_count(function: Any, arguments: Any) -> Any:
  """Compiles a program whose bytes and temporaries are to be read, for the present device or a described one.

  For CPUs XLA hands parts of a program, such as a whole attention, to a library (YNNPACK), whose memory and traffic its
  figures leave out. This program does without: its figures are of everything, whatever a library may save of it.
  """
  lowered = function.lower(*arguments)
  if jax.default_backend() != 'cpu':
    return lowered.compile()
  try:
    return lowered.compile(compiler_options={'xla_cpu_experimental_ynn_fusion_type': ''})
  except jax.errors.JaxRuntimeError as error:
    if 'No such compile option' not in str(error):
      raise
    return lowered.compile()  # a version of XLA without the library


def training_recipe(workload: Workload, mesh: Mesh) -> Recipe:
  """A run of the published recipe, for ImageNet-1k, on `mesh`: its step has the loss, AdamW, EMA and augmentation.

  The yardstick is trained by the recipe of t2t_vit_14.

  Raises:
    UserError: something does not fit together.
  """
  config = default.get_config()
  yardstick = build_yardstick(workload) if workload.model == YARDSTICK else None
  with config.unlocked():  # a form may have fields that a config lacks
    name = 't2t_vit_14' if yardstick else workload.model
    config.model.update({'name': name, 'dtype': workload.dtype, **workload.fields})
  config.data.batch_size, config.data.image_size = workload.batch_size, workload.image_size
  config.augment.mixing_group_size = math.gcd(config.augment.mixing_group_size, workload.batch_size)
  return build_recipe(resolve(config), mesh, **IMAGENET, model=yardstick)


def one_device_mesh(device: Any) -> Mesh:
  """A run's mesh of one device."""
  return sharding.make_mesh(default.get_config().mesh, [device])
