"""A run's weights as files that leave its workdir: safetensors for `load_pretrained`, beside them a model card."""

import contextlib
import functools
import os
from pathlib import Path
import tempfile
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from t2t_vit_jax.conversion.files import write_file
from t2t_vit_jax.conversion.pretrained import FOLDER, MODEL
from t2t_vit_jax.conversion.weight_format import Weights, check_weights, read_header, write_weights
from t2t_vit_jax.errors import UserError, writing_problem
from t2t_vit_jax.models.t2t_vit import ARCHITECTURE
from t2t_vit_jax.models.variants import create_model
from t2t_vit_jax.processes import check_agreement, in_all_processes
from t2t_vit_jax.recipe import sharding
from t2t_vit_jax.recipe.build import build_model
from t2t_vit_jax.recipe.init_from import DATA_FIELDS
from t2t_vit_jax.workdir.checkpoints import Checkpoints
from t2t_vit_jax.workdir.description import reading_description
from t2t_vit_jax.workdir.folder import copy_to_bucket, is_bucket
from t2t_vit_jax.workdir.model_card import hub_config, model_card

RAW, CARD, CONFIG = 'model_raw.safetensors', 'README.md', 'config.json'


def export_checkpoint(config: Any, workdir: str) -> list[str]:
  """Writes the weights of a workdir's newest checkpoint; needs neither data nor the run's config.

  Args:
    config: of any run; only its mesh is used.
    workdir: of a run that is going on, was stopped or is complete.

  Returns:
    Lines for the user.

  Raises:
    UserError: there is no checkpoint, or no room.
  """
  check_agreement(config)
  folder = epath.Path(os.path.expanduser(workdir))
  with Checkpoints(folder / 'checkpoints', read_only=True) as checkpoints:
    return write_weight_files(folder, checkpoints, sharding.make_mesh(config.mesh))


def write_weight_files(workdir: epath.Path, checkpoints: Checkpoints, mesh: Mesh) -> list[str]:
  """Writes the weights of the newest checkpoint into the workdir's folder `weights`; all processes call this.

  `model.safetensors` has the weights that count: the moving average if the run keeps one, and then the raw weights are
  in `model_raw.safetensors`. Each file appears whole or not at all.

  Args:
    workdir: on a disk or in a bucket.
    checkpoints: of the run.
    mesh: devices, each of which holds all weights for a moment.

  Returns:
    Lines for the user.

  Raises:
    UserError: the checkpoint can't be read, or the files can't be written.
  """
  step, description, weights, metrics, notes = checkpoints.load_weights(sharding.replicated(mesh))
  run = checkpoints.folder.parent.name
  with reading_description(workdir):
    contents = {
      kind: weights_of_checkpoint(description, variables, kind, step, run) for kind, variables in weights.items()
    }
    main = contents[_main_kind(weights)]
    texts = {CARD: model_card(main, description, step, metrics, checkpoints.best), CONFIG: hub_config(main)}
  in_all_processes(lambda: _write(workdir, contents, texts))
  average = 'moving average' if 'ema' in weights else 'no moving average'
  return [*notes, f'weights of step {step} ({average}): {workdir / FOLDER / MODEL}, with a model card']


def are_written(workdir: epath.Path, checkpoints: Checkpoints, *, with_ema: bool) -> bool:
  """Whether all files of the newest checkpoint's weights are there; all processes call this and get one answer."""
  folder = workdir / FOLDER
  steps = {_step_of(folder / name) for name in ([MODEL, RAW] if with_ema else [MODEL])}
  complete = all((folder / name).exists() for name in (CARD, CONFIG)) and steps == {checkpoints.latest_step}
  return bool(multihost_utils.process_allgather(np.array(complete)).all())


def _step_of(path: epath.Path) -> int | None:
  if not (path.exists() if is_bucket(path) else os.path.isfile(path)):  # opening a pipe would never end
    return None
  with path.open('rb') as file:
    header = read_header(file)
  return header['source'].get('step') if header else None


def _main_kind(weights: dict[str, Any]) -> str:
  return 'ema' if 'ema' in weights else 'raw'


def weights_of_checkpoint(description: dict[str, Any], variables: Any, kind: str, step: int, run: str) -> Weights:
  """The content of a weight file: variables of a checkpoint, on every device, with facts from its description.

  Raises:
    UserError: they do not fit together.
    Exception: of any other kind, if the description is of another program.
  """
  config = ConfigDict(description['config'])
  arrays = {key: np.asarray(array) for key, array in flatten_dict(variables, sep='/').items()}
  model = build_model(config, arrays['params/head/bias'].size)
  fields = [field for field in ARCHITECTURE if model.block_class.grows or field not in ('dense_stages', 'growth_rate')]
  name = config.model.name
  fits_name = name and all(getattr(create_model(name), field) == getattr(model, field) for field in fields)
  class_names = description.get('class_names')
  provenance = description.get('provenance', {})
  sizes = dict(num_classes=model.num_classes, image_size=model.image_size)
  weights = Weights(
    arrays=arrays,
    model=name if fits_name else None,  # with other widths it is another model
    arguments={**sizes, **{field: getattr(model, field) for field in fields}},
    channels=config.data.channels,
    data={**{field: config.data[field] for field in DATA_FIELDS}, 'num_classes': model.num_classes},
    class_names=tuple(class_names) if class_names and len(class_names) == model.num_classes else None,
    source=dict(
      run=run, step=step, weights=kind, **{name: provenance[name] for name in ('commit', 'code') if name in provenance}
    ),
  )
  check_weights(weights)
  return weights


def _write(workdir: epath.Path, contents: dict[str, Weights], texts: dict[str, str]) -> None:
  if jax.process_index() != 0:
    return
  with contextlib.ExitStack() as stack:
    target = workdir / FOLDER
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if is_bucket(workdir) else target)
    try:
      folder.mkdir(exist_ok=True)
      for leftover in folder.glob('.*.tmp'):  # of a process that was killed while it wrote
        leftover.unlink()
      for name, text in texts.items():
        write_file(folder / name, functools.partial(Path.write_text, data=text, encoding='utf-8'))
      write_weights(contents[_main_kind(contents)], folder / MODEL)
      if 'ema' in contents:
        write_weights(contents['raw'], folder / RAW)
      if is_bucket(workdir):
        copy_to_bucket(epath.Path(folder), target)
    except Exception as error:  # of a disk, or of a bucket's client, whichever that is
      reason = str(error) if isinstance(error, UserError) else writing_problem(error, folder)
      raise UserError(
        f'the weights could not be written ({reason}); the checkpoint is intact, and the same command writes them'
      ) from error
