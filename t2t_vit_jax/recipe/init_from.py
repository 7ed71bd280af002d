"""Fills a config's open fields from the weight file that a run starts from, and loads that file's variables."""

from collections.abc import Mapping
import copy
from pathlib import Path
from typing import Any

from t2t_vit_jax.conversion import Options, load_pretrained
from t2t_vit_jax.conversion.convert import load
from t2t_vit_jax.conversion.weight_format import Weights
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.t2t_vit import ARCHITECTURE, T2TViT
from t2t_vit_jax.models.variants import get_variant
from t2t_vit_jax.recipe.checks import check_ranges

DATA_FIELDS = ('image_size', 'crop_fraction', 'interpolation', 'mean', 'std')  # of `config.data` and of weight files


def resolve(config: Any) -> Any:
  """Returns a checked copy of `config` with its open fields filled, from which a run is built.

  Where `model.name` or a field of `DATA_FIELDS` is None, it gets the value of the weight file `config.init_from`. If
  that file's model has no name, its arguments fill `config.model` instead. The file is read only if a field is open.

  Raises:
    UserError: there is no weight file, it can't be read, or it contradicts the config; or a field is out of its range.
  """
  config = copy.deepcopy(config)
  open_fields = [f'data.{field}' for field in DATA_FIELDS if config.data[field] is None]
  open_fields += ['model.name'] if config.model.name is None else []
  if open_fields and config.init_from is None:
    raise UserError(
      f'{", ".join(open_fields)} must be set: on the command line, or by a weight file, --config.init_from=FILE'
    )
  if open_fields:
    weights = _load_init_from(config)
    _set_data_fields(config, weights.data, config.init_from)
    if config.model.name is None:
      config.model.name = weights.model
      if weights.model is None:
        _describe_model(config, weights)
  check_ranges(config)
  if config.model.name:
    get_variant(config.model.name)  # an unknown model is refused before data is opened
  return config


def resolve_for_evaluation(config: Any, data: Mapping[str, Any], origin: str) -> Any:
  """Returns a checked copy of `config` whose open fields of `config.data` have the values of `data`, the weights' own.

  Raises:
    UserError: `data` lacks such a value (the message names its `origin`), or a field is out of its range.
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
        raise UserError(f'{origin} has no usable data.{field}: set --config.data.{field}=...') from error


def _load_init_from(config: Any) -> Weights:
  settings = {field: config.model[field] for field in ('num_heads', 'qk_scale') if config.model[field] is not None}
  try:
    return load(Path(config.init_from), Options(model_name=config.model.name, settings=settings))[0]
  except UserError as error:
    # The message names flags of convert_torch_weights.py: these are the config's fields for them.
    advice = str(error).replace('--model=', '--config.model.name=').replace('--set=', '--config.model.')
    raise UserError(f'init_from: {advice}') from error


def _describe_model(config: Any, weights: Weights) -> None:
  """Sets the fields of `config.model` that are None to the arguments of the weights' model, which has no name."""
  if weights.arguments['block_type'] != 'standard':
    raise UserError(
      f'init_from: {config.init_from} holds a {weights.arguments["block_type"]} model without a name, which a config '
      'cannot describe'
    )
  for field in set(config.model) & set(ARCHITECTURE):
    if config.model[field] is None and weights.arguments[field] is not None:
      config.model[field] = weights.arguments[field]


def pretrained_variables(path: str, model: T2TViT, seed: int) -> dict[str, Any]:
  """Variables of the weight file `path` for `model`, fitted to its number of classes and image size.

  If the file's head has another number of classes, a new one is made from `seed`.

  Raises:
    UserError: the file can't be read, or holds another model.
  """
  settings = {'num_heads': model.num_heads} | ({} if model.qk_scale is None else {'qk_scale': model.qk_scale})
  loaded_model, variables = load_pretrained(path, model.num_classes, model.image_size, settings=settings, seed=seed)
  differences = [
    f'{field}={getattr(loaded_model, field)} instead of {getattr(model, field)}'
    for field in ARCHITECTURE
    if getattr(loaded_model, field) != getattr(model, field)
  ]
  if differences:
    raise UserError(f'init_from: {path} holds another model than the config: {", ".join(differences)}')
  return variables
