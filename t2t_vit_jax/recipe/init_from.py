"""What a config leaves to the weights that a run starts from: the model, and how its images are prepared."""

from collections.abc import Mapping
import copy
from pathlib import Path
from typing import Any

from t2t_vit_jax.conversion import Options
from t2t_vit_jax.conversion.convert import Weights, load
from t2t_vit_jax.errors import UserError

DATA_FIELDS = ('image_size', 'crop_fraction', 'interpolation', 'mean', 'std')  # of `config.data` and of weight files
MODEL_FIELDS = ('tokens_type', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'qkv_bias', 'qk_scale', 'token_dim')


def completed(config: Any) -> Any:
  """`config` with what its weight file says of the fields that are None: `model.name` and those of `DATA_FIELDS`.

  Weights of a model without a name set the other fields of `config.model` instead. A config without such a None is
  returned as it is, and its file is not read.

  Raises:
    UserError: there is no weight file, it can't be read, or it contradicts the config.
  """
  open_fields = [f'data.{field}' for field in DATA_FIELDS if getattr(config.data, field) is None]
  open_fields += ['model.name'] if config.model.name is None else []
  if not open_fields:
    return config
  if config.init_from is None:
    raise UserError(f'{", ".join(open_fields)} must be set: this config takes what is not from --config.init_from=FILE')
  found = _load(config)
  config = with_data_fields(config, found.data, config.init_from)
  if config.model.name is None:
    config.model.name = found.model
    if found.model is None:
      _describe_model(config, found)
  return config


def with_data_fields(config: Any, data: Mapping[str, Any], origin: str) -> Any:
  """A copy of `config` whose fields of `DATA_FIELDS` are those of `data` where they are None.

  Raises:
    UserError: they are no sensible values; it names `origin`.
  """
  config = copy.deepcopy(config)
  for field in DATA_FIELDS:
    if config.data[field] is None:
      try:
        value = data[field]
        config.data[field] = tuple(map(float, value)) if field in ('mean', 'std') else value
      except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{origin} has no data.{field} that fits here: set --config.data.{field}=...') from error
  return config


def _load(config: Any) -> Weights:
  settings = {field: config.model[field] for field in ('num_heads', 'qk_scale') if config.model[field] is not None}
  try:
    return load(Path(config.init_from), Options(model_name=config.model.name, settings=settings))[0]
  except UserError as error:
    # The advice is for the command line of convert_torch_weights.py.
    advice = str(error).replace('--model=', '--config.model.name=').replace('--set=', '--config.model.')
    raise UserError(f'init_from: {advice}') from error


def _describe_model(config: Any, found: Weights) -> None:
  """Sets the fields of `config.model` that are None to those of a model without a name."""
  if found.arguments['block_type'] != 'standard':
    raise UserError(
      f'init_from: {config.init_from} holds a {found.arguments["block_type"]} model without a name, which a config '
      'cannot describe'
    )
  for field in MODEL_FIELDS:
    if config.model[field] is None and found.arguments[field] is not None:
      config.model[field] = found.arguments[field]
