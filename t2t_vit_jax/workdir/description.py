"""Describes a run: in words for its user, and as JSON beside each of its checkpoints."""

from collections.abc import Iterator
import contextlib
from typing import Any

import jax

from t2t_vit_jax.errors import UserError, first_line, plural, readable_size
from t2t_vit_jax.recipe import sharding
from t2t_vit_jax.recipe.build import Recipe
from t2t_vit_jax.recipe.evaluation import Accuracy
from t2t_vit_jax.recipe.run import Run


def summary(run: Run) -> list[str]:
  """Lines about a run, one for each part."""
  recipe, eval_source = run.recipe, run.evaluator.source
  order, mesh = recipe.order, recipe.mesh
  return [
    f'model: {_model_name(recipe)}, {recipe.num_parameters:,} trained parameters, {recipe.model.dtype}',
    f'train: {run.train_source.description}, {plural(len(run.train_source), "image")}',
    f'evaluation: {eval_source.description}, {plural(len(eval_source), "image")}',
    f'steps: {recipe.total_steps:,} of {order.batch_size} images, {order.steps_per_epoch:,} an epoch, '
    f'on {plural(mesh.size, f"{jax.default_backend()} device")}',
    f'mesh: data {mesh.shape["data"]} x fsdp {mesh.shape["fsdp"]}; each device has '
    f'{plural(recipe.images_per_device, "image")} of a batch and '
    f'{readable_size(sharding.bytes_per_device(recipe.abstract_state))} of state',
    f'images: read by {_workers(run)} ({run.workers_note})',
    *dict.fromkeys((*run.train_source.notes, *eval_source.notes)),  # of a divided folder both have the same
    *_mixing_note(recipe),
    *_batch_note(recipe),
  ]


def title(run: Run, accuracy: Accuracy) -> str:
  """Title of a page about a run's result."""
  return f'{_model_name(run.recipe)}, {run.evaluator.split} {accuracy}'


def description(run: Run) -> dict[str, Any]:
  """Facts about a run that are saved with each of its checkpoints, as JSON."""
  return {
    'model': _model_name(run.recipe),
    'config': run.recipe.config,
    'train_images': len(run.train_source),
    'eval_part': run.evaluator.source.part,
    'class_names': run.train_source.class_names,
  }


@contextlib.contextmanager
def reading_description(workdir: Any) -> Iterator[None]:
  """Turns errors of code that uses a stored description, in which anything can stand, into a UserError of one line."""
  try:
    yield
  except UserError:
    raise
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    raise UserError(
      f'the newest checkpoint of {workdir} does not describe its run as expected ({first_line(error)})'
    ) from error


def _workers(run: Run) -> str:
  number, threads = run.workers.num_workers, run.workers.num_threads
  return plural(number, 'worker process') if number else plural(threads, 'thread')


def _mixing_note(recipe: Recipe) -> list[str]:
  """A line about the pixels that devices exchange, if mixing groups span several devices."""
  images, group_size = recipe.images_per_device, recipe.augmentation.mixing.group_size
  if images % group_size == 0:
    return []
  size = readable_size(images * 3 * recipe.config['data']['image_size'] ** 2)
  return [
    f'mixing: groups of {group_size} images do not fit the {images} images of a device, so devices exchange pixels: '
    f'each gets up to {size} a step; results do not change'
  ]


def _batch_note(recipe: Recipe) -> list[str]:
  """A line about the batch, if it is smaller than in the config."""
  batch_size, configured = recipe.order.batch_size, recipe.configured_batch_size
  if batch_size == configured:
    return []
  return [f'batch: {batch_size} images, not {configured}, so that an epoch has more steps']


def _model_name(recipe: Recipe) -> str:
  return recipe.config['model']['name'] or 'a model without a name'
