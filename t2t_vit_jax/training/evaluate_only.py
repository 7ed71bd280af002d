"""Evaluates weights without training: of a weight file, or of a run's newest checkpoint."""

from collections.abc import Sequence
import contextlib
import os
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict

from t2t_vit_jax.console import warn
from t2t_vit_jax.conversion import Options, find_weights
from t2t_vit_jax.conversion.convert import load
from t2t_vit_jax.conversion.pretrained import MODEL, is_name
from t2t_vit_jax.conversion.weight_format import Weights
from t2t_vit_jax.data import pipeline
from t2t_vit_jax.data.class_names import comparable
from t2t_vit_jax.data.sources import Source
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.processes import check_agreement, in_all_processes, processes_on_this_host
from t2t_vit_jax.recipe import sharding
from t2t_vit_jax.recipe.build import build_model, compute_dtype, eval_batch_size, make_eval_step
from t2t_vit_jax.recipe.evaluation import Accuracy
from t2t_vit_jax.recipe.init_from import (
  load_as_configured,
  preparation_differences,
  resolve_for_evaluation,
  weights_header,
)
from t2t_vit_jax.recipe.run import choose_workers, make_evaluator
from t2t_vit_jax.workdir.checkpoints import Checkpoints
from t2t_vit_jax.workdir.description import reading_description
from t2t_vit_jax.workdir.weight_files import weights_of_checkpoint


def evaluate_only(config: Any, source: str | os.PathLike[str]) -> dict[str, Accuracy]:
  """Evaluates weights on the evaluation split of `config.data`, at its image size.

  The weights decide about architecture and number of classes; of `config.model` only `dtype` is used. Images are
  prepared as `config.data` says; fields that are None get the values that belong to the weights.

  Args:
    config: a `ConfigDict`; `configs/default.py` explains every field.
    source: the workdir of a run, whose newest checkpoint is evaluated; else see `find_weights`.

  Returns:
    Accuracies by the kind of the weights: 'raw' and, if the run keeps it, 'ema' of a workdir; else 'weights'.

  Raises:
    UserError: weights, config and data don't fit together, or one of them can't be read.
  """
  check_agreement(config)
  mesh = sharding.make_mesh(config.mesh)
  path = os.path.expanduser(source)
  if in_all_processes(lambda: _is_workdir(path)):
    folder = epath.Path(path)
    with Checkpoints(folder / 'checkpoints', read_only=True) as checkpoints:
      _, description, weights, _, notes = checkpoints.load_weights(sharding.replicated(mesh))
    with reading_description(folder):
      loaded = weights_of_checkpoint(description, weights['raw'], 'raw', 0, folder.name)
      model = build_model(ConfigDict(description['config']), loaded.arguments['num_classes'])
    for line in notes if jax.process_index() == 0 else ():
      warn(line)
  else:
    loaded = in_all_processes(lambda: _load(path, config))
    model, variables = loaded.build()
    weights = {'weights': jax.device_put(jax.device_get(variables), sharding.replicated(mesh))}
  config = in_all_processes(lambda: resolve_for_evaluation(config, loaded.data, loaded.channels, path))
  model = model.clone(dtype=compute_dtype(config))
  eval_step = make_eval_step(config, mesh, model)
  differences = preparation_differences(config, loaded.data)
  images = in_all_processes(lambda: _open_source(config, model.num_classes, loaded.class_names))
  if jax.process_index() == 0:
    for line in images.notes:
      warn(line)
    if differences:
      warn(f'images are prepared otherwise than those of {path}: {"; ".join(differences)}')
  local_batch_size = eval_batch_size(config, mesh) // jax.process_count()
  workers, _ = choose_workers(config.data, local_batch_size, processes_on_this_host())
  return make_evaluator(config, mesh, model, eval_step, images, workers)(weights, warn)


def _load(path: str, config: Any) -> Weights:
  file = find_weights(path)
  try:
    return load(file, Options())[0]
  except UserError:
    if weights_header(file):
      raise
  try:  # a checkpoint hides its number of heads, or fits several named models
    return load_as_configured(file, config, model_name=None)
  except UserError as error:
    with contextlib.suppress(UserError):
      return load_as_configured(file, config, model_name=config.model.name)
    raise error


def _open_source(config: Any, num_classes: int, class_names: Sequence[str] | None) -> Source:
  """Opens the evaluation split, with the labels of the weights' classes: by name, if the weights have names.

  Raises:
    UserError: the data is missing, has a class that the weights don't know, or lacks one.
  """
  source = pipeline.open_eval_source(config.data)
  labelled = source.for_model(class_names, num_classes)
  num_missing = num_classes - len(set(comparable(source.class_names)))
  if not config.data.allow_missing_classes and num_missing:
    raise UserError(
      f'{source.description} lacks {num_missing} of the {num_classes} classes of the weights; to evaluate those '
      'that it has: --config.data.allow_missing_classes=True'
    )
  return labelled


def _is_workdir(path: str) -> bool:
  """Whether `path` is a folder that may be a run's, on a disk or in a bucket, and not one of weights alone."""
  return not is_name(path) and epath.Path(path).is_dir() and not (epath.Path(path) / MODEL).exists()
