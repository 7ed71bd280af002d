"""The weight files of this package: safetensors, with a header that holds all that is needed to use the weights."""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any, BinaryIO

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from t2t_vit_jax.conversion import files
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.soft_split import token_grid
from t2t_vit_jax.models.t2t_vit import T2TViT

ImageSize = int | tuple[int, int]

METADATA_KEY = 't2t_vit_jax'  # in the header of a file; its value is JSON


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
    None for any other file.
  """
  try:
    length = int.from_bytes(file.read(8), 'little')
    header = json.loads(file.read(min(length, files.MAX_SAFETENSORS_HEADER)))
    return dict(_from_json(json.loads(header['__metadata__'][METADATA_KEY])))
  except (ValueError, KeyError, TypeError):
    return None


def read_weights(path: Path) -> Weights:
  """Reads a weight file of this package, and checks it as closely as a file from elsewhere.

  Raises:
    UserError: its header or its tensors describe no model; the message lists every tensor at fault.
  """
  arrays = files.read_safetensors(path)
  try:
    metadata = _from_json(json.loads(files.read_metadata(path)[METADATA_KEY]))
    metadata.pop('version')
    weights = Weights(arrays=arrays, **metadata)
    # Shapes of an absurdly large model would take forever, so first its size must be one that the file can hold.
    height, width = token_grid(sides(weights.arguments['image_size']))
    table, stored = (1, 1 + height * width, weights.arguments['embed_dim']), arrays['frozen/pos_embed'].shape
    blocks = weights.arguments['depth'] + sum(weights.arguments.get('dense_stages', ()))
    if stored != table or blocks > len(arrays):
      raise UserError(f'frozen/pos_embed is {stored}, not {table}, or most of {blocks} blocks are missing')
    expected = expected_shapes(weights.arguments, weights.channels)
  except UserError:
    raise
  except Exception as error:  # JSON can hold anything
    raise UserError(f'its metadata describe no model: {type(error).__name__}: {error}') from error
  check_tensors(arrays, expected)
  return weights


def expected_shapes(arguments: Mapping[str, Any], channels: int) -> dict[str, tuple[int, ...]]:
  """Path -> shape of every variable of the model; computes none."""
  model = T2TViT(**arguments)
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
