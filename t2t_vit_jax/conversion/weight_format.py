"""The weight files of this package: safetensors, with a header that holds all that is needed to use the weights."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from t2t_vit_jax.conversion import files
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.soft_split import token_grid
from t2t_vit_jax.models.t2t_vit import CHOICES, T2TViT

ImageSize = int | tuple[int, int]

METADATA_KEY = 't2t_vit_jax'  # in the header of a file; its value is JSON


class _Kind(NamedTuple):
  """Values that a field of the header may have."""

  words: str
  includes: Callable[[Any], bool]


def _whole(least: int, most: int = 2**24) -> _Kind:
  return _Kind(f'a whole number from {least} to {most}', lambda x: type(x) is int and least <= x <= most)


def _number(least: float, most: float) -> _Kind:
  # Wide limits: far beyond them, float32 has no finite result.
  return _Kind(f'a number from {least:g} to {most:g}', lambda x: type(x) in (int, float) and least <= x <= most)


def _one_of(values: Collection[str]) -> _Kind:
  return _Kind(' or '.join(map(repr, values)), lambda x: isinstance(x, str) and x in values)


def _or_none(kind: _Kind) -> _Kind:
  return _Kind(f'{kind.words}, or null', lambda x: x is None or kind.includes(x))


def _list(kind: _Kind, lengths: Collection[int] | None = None) -> _Kind:
  count = '' if lengths is None else f' of {" or ".join(map(str, lengths))}'
  return _Kind(
    f'a list{count}, each {kind.words}',
    lambda x: isinstance(x, tuple) and (lengths is None or len(x) in lengths) and all(map(kind.includes, x)),
  )


_TEXT, _OBJECT = _Kind('text', lambda x: isinstance(x, str)), _Kind('an object', lambda x: isinstance(x, dict))
_TRUTH = _Kind('true or false', lambda x: isinstance(x, bool))
_SIDE, _COLOURS = _whole(1, 2**16), (1, 3)
_SIZE = _Kind('a number of px, or two', lambda x: _SIDE.includes(x) or _list(_SIDE, (2,)).includes(x))
# What the header must hold. `arguments` has no more fields than these; `data` and `source` may have others.
_SCHEMA = {
  'model': _or_none(_TEXT),
  'channels': _whole(1, 2**10),
  'class_names': _or_none(_list(_TEXT)),
  'arguments': _OBJECT,
  'arguments.num_classes': _whole(0),
  'arguments.token_labeling': _TRUTH,
  'arguments.image_size': _SIZE,
  'arguments.tokens_type': _one_of(CHOICES['tokens_type']),
  'arguments.embed_dim': _whole(1),
  'arguments.depth': _whole(1),
  'arguments.num_heads': _whole(1),
  'arguments.mlp_ratio': _number(1e-3, 1e3),
  'arguments.qkv_bias': _TRUTH,
  'arguments.qk_scale': _or_none(_number(1e-6, 1e6)),
  'arguments.token_dim': _whole(1),
  'arguments.block_type': _one_of(CHOICES['block_type']),
  'arguments.dense_stages': _list(_whole(1)),
  'arguments.growth_rate': _whole(1),
  'data': _OBJECT,
  'data.crop_fraction': _number(1e-2, 1),
  'data.interpolation': _one_of(('bilinear', 'bicubic')),
  'data.mean': _list(_number(-1e3, 1e3), _COLOURS),
  'data.std': _list(_number(1e-38, 1e3), _COLOURS),
  'data.orientation': _one_of(('upright', 'ignored')),
  'source': _OBJECT,
  'source.weights': _or_none(_one_of(('ema', 'raw'))),
  'source.step': _whole(0, 2**53),
}
HEADER_FIELDS = tuple(_SCHEMA)
_OPTIONAL = (
  'arguments.token_labeling',
  'arguments.dense_stages',
  'arguments.growth_rate',
  'data.orientation',
  'source.step',
)


@dataclasses.dataclass(frozen=True)
class Weights:
  """A model's variables, and all that is needed to use them."""

  arrays: dict[str, np.ndarray]  # float32, by path: 'params/...' and 'frozen/...'
  model: str | None  # its name, if it has one
  arguments: dict[str, Any]  # of `T2TViT`
  channels: int  # of the images
  data: dict[str, Any]  # fields of `DataDefaults`
  class_names: tuple[str, ...] | None
  source: dict[str, Any]  # the file that they come from, and which of its `weights`: 'ema', 'raw' or None

  def metadata(self) -> dict[str, Any]:
    """All fields but the arrays."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != 'arrays'}

  def build(self) -> tuple[T2TViT, dict[str, Any]]:
    """The model, float32, and its variables as JAX arrays."""
    variables = unflatten_dict({key: jnp.asarray(array) for key, array in self.arrays.items()}, sep='/')
    return T2TViT(**self.arguments), variables


def write_weights(weights: Weights, path: Path) -> None:
  """Writes a safetensors file of this package: whole or not at all, in place of an older one.

  Raises:
    UserError: `path` can't be written.
  """
  from t2t_vit_jax import __version__  # not at the top: the package imports this module

  header = {METADATA_KEY: json.dumps({**weights.metadata(), 'version': __version__})}
  arrays = {key: np.ascontiguousarray(array) for key, array in weights.arrays.items()}
  size = sum(array.nbytes for array in arrays.values())
  files.write_file(path, lambda temporary: safetensors.numpy.save_file(arrays, temporary, header), size)


def read_header(file: BinaryIO) -> dict[str, Any] | None:
  """Reads the header of an open file that `write_weights` wrote: the fields of `Weights.metadata`, and `version`.

  Returns:
    None for any other file, and for a header that `read_weights` refuses.
  """
  try:
    length = int.from_bytes(file.read(8), 'little')
    header = json.loads(file.read(min(length, files.MAX_SAFETENSORS_HEADER)))
    return _parse(header['__metadata__'][METADATA_KEY])
  except (ValueError, KeyError, TypeError, RecursionError):
    return None


def read_weights(path: Path) -> Weights:
  """Reads a weight file of this package, and checks it as closely as a file from elsewhere.

  Raises:
    UserError: its header or its tensors describe no model; the message lists every tensor at fault.
  """
  arrays = files.read_safetensors(path)
  metadata = _parse(files.read_metadata(path)[METADATA_KEY])
  weights = Weights(arrays=arrays, **{field: x for field, x in metadata.items() if field != 'version'})
  check_weights(weights)
  return weights


def check_weights(weights: Weights) -> None:
  """Raises a UserError unless `read_weights` takes what `write_weights` makes of them: every field and every tensor."""
  _check_metadata(_from_json(weights.metadata()))
  arguments, arrays = weights.arguments, weights.arrays
  try:
    # Shapes of an absurdly large model would take forever, so first its size must be one that the file can hold.
    height, width = token_grid(sides(arguments['image_size']))
    table, stored = (1, 1 + height * width, arguments['embed_dim']), arrays['frozen/pos_embed'].shape
    blocks = arguments['depth'] + sum(arguments.get('dense_stages', ()))
    if stored != table or blocks > len(arrays):
      raise UserError(f'frozen/pos_embed is {stored}, not {table}, or most of {blocks} blocks are missing')
    expected = expected_shapes(arguments, weights.channels)
  except UserError:
    raise
  except Exception as error:  # fields that do not fit together
    raise UserError(f'its metadata describe no model: {type(error).__name__}: {error}') from error
  check_tensors(arrays, expected)


def _parse(text: str) -> dict[str, Any]:
  """The metadata of a header, JSON, with tuples in place of lists.

  Raises:
    UserError: it is no JSON, or a field is not as `_SCHEMA` says.
  """
  try:
    metadata = _from_json(json.loads(text))
  except (ValueError, RecursionError) as error:
    raise UserError(f'its metadata cannot be read: {type(error).__name__}') from error
  if not isinstance(metadata, dict):
    raise UserError('its metadata must be an object')
  _check_metadata(metadata)
  return metadata


def _check_metadata(metadata: dict[str, Any]) -> None:
  """Raises a UserError that names a field which is missing, unknown or of another kind than `_SCHEMA` says."""
  for path, kind in _SCHEMA.items():
    group, _, field = path.rpartition('.')
    fields = metadata[group] if group else metadata
    if field not in fields and path not in _OPTIONAL:
      raise UserError(f'its metadata lack {path}: it must be {kind.words}')
    if field in fields:
      check_field(path, fields[field], f'{path} in its metadata')
  paths = {*metadata, *(f'arguments.{field}' for field in metadata['arguments'])}
  if unknown := paths - _SCHEMA.keys() - {'version'} | {path for path in metadata if '.' in path}:
    raise UserError(f'its metadata have unknown fields, as of a newer version: {", ".join(sorted(unknown))[:100]}')
  names, number = metadata['class_names'], metadata['arguments']['num_classes']
  if names is not None and len(names) != number:
    raise UserError(f'class_names in its metadata are {len(names)}, of {number} classes')


def check_field(path: str, value: Any, name: str) -> None:
  """Raises a UserError, which calls it `name`, if a header may not hold `value` as its field `path`."""
  kind = _SCHEMA.get(path)
  if kind and not kind.includes(value):
    raise UserError(f'{name} must be {kind.words}, not {repr(value)[:100]}')


def expected_shapes(arguments: Mapping[str, Any], channels: int) -> dict[str, tuple[int, ...]]:
  """Path -> shape of every variable of the model; computes none."""
  # With tuples in place of lists, and without qk_scale, which may be an array and changes no shape: it can be hashed.
  return dict(_shapes(T2TViT(**{**_from_json(dict(arguments)), 'qk_scale': None}), channels))


@functools.lru_cache(maxsize=32)
def _shapes(model: T2TViT, channels: int) -> dict[str, tuple[int, ...]]:
  height, width = sides(model.image_size)
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, height, width, channels))))
  return {key: leaf.shape for key, leaf in flatten_dict(variables, sep='/').items()}


def check_tensors(arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
  """Raises a UserError that lists all tensors that are missing, left over, misshaped or not finite."""
  problems = [f'{name} is missing' for name in expected if name not in arrays]
  for name, array in arrays.items():
    if name not in expected:
      problems.append(f'{name} {array.shape} has no place in the model')
    elif array.shape != expected[name]:
      problems.append(f'{name} is {array.shape}, not {expected[name]}')
    elif not np.isfinite(array).all():
      problems.append(f'{name} holds NaN or infinity')
  if problems:
    raise UserError('; '.join(problems))


def sides(image_size: ImageSize) -> tuple[int, int]:
  return (image_size, image_size) if isinstance(image_size, int) else image_size


def _from_json(value: Any) -> Any:
  """A JSON value with tuples in place of lists."""
  if isinstance(value, list):
    return tuple(_from_json(item) for item in value)
  return {key: _from_json(item) for key, item in value.items()} if isinstance(value, dict) else value
