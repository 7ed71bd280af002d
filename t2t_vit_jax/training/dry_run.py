"""Builds and checks everything of a run, trains nothing and writes nothing."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from t2t_vit_jax.console import say, warn
from t2t_vit_jax.data.faults import check_sample
from t2t_vit_jax.errors import plural, readable_size
from t2t_vit_jax.processes import in_all_processes
from t2t_vit_jax.recipe.build import Recipe
from t2t_vit_jax.recipe.run import build_run
from t2t_vit_jax.recipe.sharding import bytes_per_device
from t2t_vit_jax.workdir.description import summary
from t2t_vit_jax.workdir.trackers import check_trackers


def dry_run(config: Any) -> None:
  """Builds model, optimizer and data of a run, traces a step, and prints a summary and the memory it needs.

  Raises:
    UserError: as a run would; or none of a few images of a split can be read.
  """
  in_all_processes(lambda: check_trackers(config.logging.tracker))
  run = build_run(config)
  for source in (run.train_source, run.evaluator.source):
    in_all_processes(functools.partial(check_sample, source, warn))
  recipe = run.recipe
  if recipe.init_from is not None:
    recipe.fresh_state()  # refuses a file that can't be read or doesn't fit
  jax.eval_shape(recipe.train_step, *recipe.abstract_train_arguments)
  for line in summary(run):
    say(line)
  images = recipe.images_per_device // recipe.accumulate_steps
  sizes = bytes_per_device(recipe.abstract_state), _bytes(recipe.abstract_state.params), _activations(recipe, images)
  state, gradients, activations = map(readable_size, sizes)
  say(
    f'memory of each device, estimated: {state} state, {gradients} gradients, '
    f'{activations} for the backward pass of {plural(images, "image")} '
    '(all values it reads; the compiler keeps less)'
  )
  say('dry run: nothing was trained, nothing written')


def _activations(recipe: Recipe, images: int) -> int:
  """Bytes of all values that the backward pass of a batch reads."""
  model, size = recipe.model, recipe.model.image_size

  def residuals(variables: Any, batch: jax.Array, rng: jax.Array) -> Any:
    def loss_of(params: Any) -> jax.Array:
      logits: Any = model.apply(variables | {'params': params}, batch, train=True, rngs={'dropout': rng})
      return logits.sum()

    return jax.vjp(loss_of, variables['params'])[1]  # a tree of the values that it reads

  batch = jax.ShapeDtypeStruct((images, size, size, recipe.channels), jnp.float32)
  return _bytes(jax.eval_shape(residuals, recipe.abstract_state.variables(), batch, jax.random.key(0)))


def _bytes(tree: Any) -> int:
  return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
