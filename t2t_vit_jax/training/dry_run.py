"""Builds and checks everything of a run, trains nothing and writes nothing."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from t2t_vit_jax.console import say
from t2t_vit_jax.recipe.build import Recipe
from t2t_vit_jax.recipe.run import build_run
from t2t_vit_jax.recipe.sharding import bytes_per_device
from t2t_vit_jax.workdir.description import summary
from t2t_vit_jax.workdir.trackers import check_trackers


def dry_run(config: Any) -> None:
  """Builds model, optimizer and data of a run, traces a step, and prints a summary and the memory it needs.

  Raises:
    UserError: as a run would.
  """
  check_trackers(config.logging.tracker)
  run = build_run(config)
  recipe = run.recipe
  if recipe.init_from is not None:
    recipe.fresh_state()  # refuses a file that can't be read or doesn't fit
  jax.eval_shape(recipe.train_step, *recipe.abstract_train_arguments)
  for line in summary(run):
    say(line)
  images = recipe.images_per_device // recipe.accumulate_steps
  gradients = _gigabytes(recipe.abstract_state.params)
  state = bytes_per_device(recipe.abstract_state) / 1e9
  say(
    f'memory of each device, estimated: {state:.2f} GB state, {gradients:.2f} GB gradients, '
    f'{_activations(recipe, images):.2f} GB for the backward pass of {images} images '
    '(all values it reads; the compiler keeps less)'
  )
  say('dry run: nothing was trained, nothing written')


def _activations(recipe: Recipe, images: int) -> float:
  """GB of all values that the backward pass of a batch reads."""
  model, size = recipe.model, recipe.model.image_size

  def residuals(variables: Any, batch: jax.Array, rng: jax.Array) -> Any:
    def loss_of(params: Any) -> jax.Array:
      logits: Any = model.apply(variables | {'params': params}, batch, train=True, rngs={'dropout': rng})
      return logits.sum()

    return jax.vjp(loss_of, variables['params'])[1]  # a tree of the values that it reads

  batch = jax.ShapeDtypeStruct((images, size, size, recipe.channels), jnp.float32)
  return _gigabytes(jax.eval_shape(residuals, recipe.abstract_state.variables(), batch, jax.random.key(0)))


def _gigabytes(tree: Any) -> float:
  return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)) / 1e9
