"""Fills a config's open fields from the weight file that a run starts from, and loads that file's variables."""

from collections.abc import Mapping
import copy
from pathlib import Path
from typing import Any

from t2t_vit_jax.conversion import Options, load_pretrained
from t2t_vit_jax.conversion.convert import Weights, load
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.t2t_vit import ARCHITECTURE, T2TViT
from t2t_vit_jax.models.variants import get_variant
from t2t_vit_jax.recipe.checks import check_ranges

DATA_FIELDS = ('image_size', 'crop_fraction', 'interpolation', 'mean', 'std')  # of `config.data` and of weight files


def resolve(config: Any) -> Any:
  """Checks a copy of `config` and fills its open fields: the result is what a run is built from.

  Where `model.name` or a field of `DATA_FIELDS` is None, it gets the value of the weight file `config.init_from`.
  Weights of a model without a name set the other fields of `config.model` instead. Without such a None the file is not
  read.

  Raises:
    UserError: there is no weight file, it can't be read, or it contradicts the config; or a field is out of its range.
  """
  config = copy.deepcopy(config)
  open_fields = [f'data.{field}' for field in DATA_FIELDS if config.data[field] is None]
  open_fields += ['model.name'] if config.model.name is None else []
  if open_fields and config.init_from is None:
    raise UserError(
      f'{", ".join(open_fields)} must be set: set them, or give --config.init_from=FILE, a weight file that has them'
    )
  if open_fields:
    weights = _load(config)
    _set_data_fields(config, weights.data, config.init_from)
    if config.model.name is None:
      config.model.name = weights.model
      if weights.model is None:
        _describe_model(config, weights)
  check_ranges(config)
  if config.model.name:
    get_variant(config.model.name)  # says that there is no such model before data is prepared
  return config


def resolve_for_evaluation(config: Any, data: Mapping[str, Any], origin: str) -> Any:
  """A checked copy of `config` for weights whose images are prepared as `data` says where `config.data` is None.

  Raises:
    UserError: `data` has no sensible values, or a field is out of its range; it names `origin`.
  """
  config = copy.deepcopy(config)
  _set_data_fields(config, data, origin)
  check_ranges(config)
  return config


def _set_data_fields(config: Any, data: Mapping[str, Any], origin: str) -> None:
  for field in DATA_FIELDS:
    if config.data[field] is None:
      try:
        value = data[field]
        config.data[field] = tuple(map(float, value)) if field in ('mean', 'std') else value
      except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{origin} has no data.{field} that fits here: set --config.data.{field}=...') from error


def _load(config: Any) -> Weights:
  settings = {field: config.model[field] for field in ('num_heads', 'qk_scale') if config.model[field] is not None}
  try:
    return load(Path(config.init_from), Options(model_name=config.model.name, settings=settings))[0]
  except UserError as error:
    # The advice is for the command line of convert_torch_weights.py.
    advice = str(error).replace('--model=', '--config.model.name=').replace('--set=', '--config.model.')
    raise UserError(f'init_from: {advice}') from error


def _describe_model(config: Any, weights: Weights) -> None:
  """Sets the fields of `config.model` that are None to those of a model without a name."""
  if weights.arguments['block_type'] != 'standard':
    raise UserError(
      f'init_from: {config.init_from} holds a {weights.arguments["block_type"]} model without a name, which a config '
      'cannot describe'
    )
  for field in set(config.model) & set(ARCHITECTURE):
    if config.model[field] is None and weights.arguments[field] is not None:
      config.model[field] = weights.arguments[field]


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
