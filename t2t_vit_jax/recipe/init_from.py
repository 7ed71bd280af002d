"""Fills a config's open fields from the weight file that a run starts from, and loads that file's variables."""

from collections.abc import Mapping, Sequence
import copy
import dataclasses
from typing import Any

from t2t_vit_jax.conversion import Options, find_weights
from t2t_vit_jax.conversion.convert import PathLike, load, log_notes
from t2t_vit_jax.conversion.weight_format import Weights, read_header
from t2t_vit_jax.data.class_names import comparable, comparable_of_model
from t2t_vit_jax.data.transforms import MODES
from t2t_vit_jax.errors import UserError, plural
from t2t_vit_jax.models.preprocessing import for_channels
from t2t_vit_jax.models.published import PUBLISHED
from t2t_vit_jax.models.t2t_vit import ARCHITECTURE, T2TViT
from t2t_vit_jax.models.variants import get_variant
from t2t_vit_jax.recipe.checks import check_ranges

# Fields of `config.data` that weight files have too; older files lack the last.
DATA_FIELDS = ('image_size', 'crop_fraction', 'interpolation', 'mean', 'std', 'orientation')


def resolve(config: Any) -> Any:
  """Returns a checked copy of `config` with its open fields filled, from which a run is built.

  Where `model.name` or a field of `DATA_FIELDS` is None, it gets the value of the weight file `config.init_from`. If
  that file's model has no name, its arguments fill `config.model` instead. The file is read only if a field is open.
  `data.orientation` and `data.channels` need no file: see `_set_orientation` and `_channels`.

  Raises:
    UserError: there is no weight file, it can't be read, or it contradicts the config; or a field is out of its range.
  """
  config = copy.deepcopy(config)
  is_open = None in (config.data.orientation, config.data.channels)
  header = weights_header(config.init_from) if is_open and config.init_from is not None else {}
  _set_orientation(config, header.get('data', {}))
  open_fields = [f'data.{field}' for field in DATA_FIELDS if config.data[field] is None]
  open_fields += ['model.name'] if config.model.name is None else []
  if open_fields and config.init_from is None:
    raise UserError(
      f'{", ".join(open_fields)} must be set: on the command line, or by a weight file, --config.init_from=FILE'
    )
  weights = None
  if open_fields:
    weights = _load_init_from(config)
    _set_data_fields(config, weights.data, config.init_from)
    if config.model.name is None:
      config.model.name = weights.model
      if weights.model is None:
        _describe_model(config, weights)
  if config.data.channels is None:
    config.data.channels = weights.channels if weights else _channels(config, header)
  _fit_channels(config)
  check_ranges(config)
  if config.model.name:
    get_variant(config.model.name)  # an unknown model is refused before data is opened
  return config


def resolve_for_evaluation(config: Any, data: Mapping[str, Any], channels: int, origin: str) -> Any:
  """Returns a checked copy of `config` whose open fields of `config.data` have the weights' own values.

  Args:
    config: of any run.
    data: the fields that belong to the weights.
    channels: of the images that the weights take.
    origin: of the weights, for messages.

  Raises:
    UserError: `data` lacks such a value, or a field is out of its range.
  """
  config = copy.deepcopy(config)
  _set_data_fields(config, data, origin)
  if config.data.channels is None:
    config.data.channels = channels
  check_channels(config.data.channels, channels, origin)
  _fit_channels(config)
  check_ranges(config)
  return config


def _set_data_fields(config: Any, data: Mapping[str, Any], origin: str) -> None:
  _set_orientation(config, data)
  for field in DATA_FIELDS:
    if config.data[field] is None:
      try:
        value = data[field]
        config.data[field] = tuple(map(float, value)) if field in ('mean', 'std') else value
      except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{origin} has no usable data.{field}: set --config.data.{field}=...') from error


def _set_orientation(config: Any, data: Mapping[str, Any]) -> None:
  """Fills an open `data.orientation`: with the weights' own, else pictures from people's folders are turned upright."""
  if config.data.orientation is None:
    default = 'upright' if config.data.source == 'folder' else 'ignored'
    config.data.orientation = data.get('orientation', default)


def _channels(config: Any, header: Mapping[str, Any]) -> int:
  """Channels of the images that the weights `config.init_from` take, of which `header` is known; 3 without weights."""
  if header:
    return int(header['channels'])
  if config.init_from is None or config.init_from in PUBLISHED:  # without a header they cannot be fetched
    return 3
  try:
    return _load_init_from(config).channels
  except UserError:  # if the file is needed, its error comes then
    return 3


def _fit_channels(config: Any) -> None:
  """Averages a mean and std of RGB where images are grey."""
  for field in ('mean', 'std'):
    config.data[field] = for_channels(config.data[field], config.data.channels)


def check_channels(configured: int, channels: int, origin: Any) -> None:
  """Raises UserError unless images are read with the channels that the weights of `origin` take."""
  if channels not in MODES:
    raise UserError(f'{origin} holds a model for images of {channels} channels, but images are read as RGB or grey')
  if configured != channels:
    raise UserError(
      f'{origin} holds a model for images of {plural(channels, "channel")}: '
      f'leave out --config.data.channels={configured}'
    )


def weights_header(source: PathLike) -> dict[str, Any]:
  """The header of the weights that `find_weights` finds, of the format of this package; empty if there are none."""
  try:
    file = find_weights(source)
    if not file.is_file():  # a pipe would never end
      return {}
    with file.open('rb') as stream:
      return read_header(stream) or {}
  except (OSError, UserError):  # whether the weights are needed at all is not known here
    return {}


def _load_init_from(config: Any) -> Weights:
  try:
    return load_as_configured(config.init_from, config, config.model.name)
  except UserError as error:
    raise UserError(f'init_from: {error}') from error


def load_as_configured(path: PathLike, config: Any, model_name: str | None) -> Weights:
  """Loads a weight file; what a PyTorch checkpoint does not show of its model, `config.model` tells.

  Args:
    path: a weight file or a name; see `find_weights`.
    config: of the run; of `config.model` only what tensors do not show is used.
    model_name: the named model that the file must hold; None if it is the only one that fits, or has no name.

  Raises:
    UserError: the file can't be read, or it stays open which model it holds.
  """
  settings = {field: config.model[field] for field in ('num_heads', 'qk_scale') if config.model[field] is not None}
  try:
    return load(find_weights(path), Options(model_name=model_name, settings=settings))[0]
  except UserError as error:
    # The message names flags of convert_torch_weights.py: these are the config's fields for them.
    advice = str(error).replace('--model=', '--config.model.name=').replace('--set=', '--config.model.')
    raise UserError(advice) from error


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


def preparation_differences(config: Any, data: Mapping[str, Any]) -> list[str]:
  """A phrase for each field of `config.data` that prepares images otherwise than `data`, the weights' own fields."""
  pairs = {field: (_plain(config.data[field]), _plain(data[field])) for field in DATA_FIELDS if field in data}
  return [f'data.{field} is {now}, not {wanted}' for field, (now, wanted) in pairs.items() if now != wanted]


def _plain(value: Any) -> Any:
  return [float(x) for x in value] if isinstance(value, tuple | list) else value


def pretrained_variables(
  path: str, model: T2TViT, channels: int, seed: int, class_names: Sequence[str] | None
) -> dict[str, Any]:
  """Variables of the weights `path`, a file or a name, for `model`, fitted to its number of classes and image size.

  A new head is made from `seed` if the file's has another number of classes, or other classes than `class_names`. The
  second head of token labeling is dropped.

  Raises:
    UserError: the file can't be read, or holds another model.
  """
  settings = {'num_heads': model.num_heads} | ({} if model.qk_scale is None else {'qk_scale': model.qk_scale})
  changes: dict[str, Any] = dict(num_classes=model.num_classes, image_size=model.image_size, one_head=True, seed=seed)
  options, file = Options(settings=settings, **changes), find_weights(path)
  weights, notes = load(file, options)
  if weights.class_names and class_names and comparable_of_model(weights.class_names) != comparable(class_names):
    weights, notes = load(file, dataclasses.replace(options, fresh_head=True))
  log_notes(path, notes)
  check_channels(channels, weights.channels, path)
  loaded_model, variables = weights.build()
  differences = [
    f'{field}={getattr(loaded_model, field)} instead of {getattr(model, field)}'
    for field in ARCHITECTURE
    if getattr(loaded_model, field) != getattr(model, field)
  ]
  if differences:
    raise UserError(f'init_from: {path} holds another model than the config: {", ".join(differences)}')
  return variables
