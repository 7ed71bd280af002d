"""From a checkpoint to checked variables, to a file that holds weights and nothing else, and back to PyTorch."""

from collections.abc import Mapping
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from t2t_vit_jax.conversion import files, infer, names
from t2t_vit_jax.conversion.checkpoint import WeightsKind, read_checkpoint
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.layers import Dense
from t2t_vit_jax.models.positions import resize_position_embedding
from t2t_vit_jax.models.soft_split import token_grid
from t2t_vit_jax.models.t2t_vit import T2TViT
from t2t_vit_jax.models.variants import VARIANTS, DataDefaults

ImageSize = int | tuple[int, int]
PathLike = str | os.PathLike[str]

METADATA_KEY = 't2t_vit_jax'  # in the header of our files; its value is JSON
_CIFAR = dict(  # how the reference's CIFAR transfer prepares images
  crop_fraction=1.0, interpolation='bilinear', mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
)


@dataclasses.dataclass(frozen=True)
class Options:
  """Facts that a user may give about a file. A converted one knows the first three, and must agree."""

  model_name: str | None = None  # where the tensors fit more than one named model
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # arguments that tensors don't show
  weights: WeightsKind | None = None  # None: the moving average where the file has both
  num_classes: int | None = None  # None: the file's head; another number: a fresh head, 0: none
  image_size: ImageSize | None = None  # px; another than the file's resizes the stored position table
  seed: int = 0  # of a fresh head

  def __post_init__(self) -> None:
    unknown = set(self.settings) - {'num_heads', 'qk_scale', 'image_size'}
    numbers = [self.settings.get('num_heads', 1), self.settings.get('qk_scale', 1), 1 + (self.num_classes or 0)]
    if unknown or not all(0 < number < math.inf for number in numbers):
      raise UserError(f'num_heads and qk_scale must be positive, num_classes not negative: {self}')


@dataclasses.dataclass(frozen=True)
class Weights:
  """A model's variables and what must be known to use them."""

  arrays: dict[str, np.ndarray]  # float32, by path: 'params/...' and 'frozen/...'
  model: str | None  # its name, if it has one
  arguments: dict[str, Any]  # of `T2TViT`
  channels: int  # of the images
  data: dict[str, Any]  # fields of `DataDefaults`
  class_names: tuple[str, ...] | None
  source: dict[str, Any]  # where they come from, and which `weights` of there: 'ema', 'raw' or None

  def metadata(self) -> dict[str, Any]:
    """Everything but the arrays."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != 'arrays'}

  def build(self) -> tuple[T2TViT, dict[str, Any]]:
    """The model, float32, and its variables as JAX arrays."""
    variables = unflatten_dict({key: jnp.asarray(array) for key, array in self.arrays.items()}, sep='/')
    return T2TViT(**self.arguments), variables


def load_pretrained(
  path: PathLike, num_classes: int | None = None, image_size: ImageSize | None = None, **options: Any
) -> tuple[T2TViT, dict[str, Any]]:
  """Model and variables of a converted file, or of a checkpoint that is then converted in memory (needs torch).

  >>> model, variables = load_pretrained('weights.safetensors')
  >>> logits = model.apply(variables, images)  # (B, H, W, 3) -> (B, num_classes)

  Args:
    path: the file.
    num_classes: another number than the file's gives a fresh head, to be trained; 0 gives none.
    image_size: pixels, a side or (height, width); another than the file's resizes the stored position table.
    **options: further fields of `Options`.

  Returns:
    The model, float32, and its variables as JAX arrays.

  Raises:
    UserError: one line that names the file and every tensor at fault.
  """
  path = Path(path)
  found, notes = load(path, Options(num_classes=num_classes, image_size=image_size, **options))
  for note in notes:
    logging.log(logging.WARNING if note.startswith(_CHANGES) else logging.INFO, '%s: %s', path, note)
  return found.build()


def convert(
  path: PathLike, output: PathLike, options: Options, *, reverse: bool = False, force: bool = False
) -> list[str]:
  """Writes the weights of any file that `load` reads as a safetensors file of this package.

  With `reverse`, as a PyTorch file instead: a plain state dict under the reference's names. Unless
  `force` is set, an existing `output` is an error.

  Returns:
    Lines for the user: what was found, chosen, dropped and written.

  Raises:
    UserError: one line that names the file and every tensor at fault. No file was written.
  """
  output = Path(output)
  files.check_output(output, force=force)
  found, notes = load(Path(path), options)
  files.write_file(output, lambda temporary: (_write_torch if reverse else _write)(found, temporary))
  numbers = sum(array.size for array in found.arrays.values())
  return [*notes, f'wrote {output}: {len(found.arrays)} tensors, {numbers:,} numbers']


def write_weights(found: Weights, path: Path) -> None:
  """Writes a safetensors file of this package: whole or not at all, in place of one that is there.

  Raises:
    UserError: `path` can't be written.
  """
  files.write_file(path, lambda temporary: _write(found, temporary))


def read_header(file: BinaryIO) -> dict[str, Any] | None:
  """Reads the header of an open file of `write_weights`: the fields of `Weights` but the arrays, and `version`.

  Returns:
    None for any other file.
  """
  try:
    length = int.from_bytes(file.read(8), 'little')
    header = json.loads(file.read(min(length, files.MAX_SAFETENSORS_HEADER)))
    return dict(_from_json(json.loads(header['__metadata__'][METADATA_KEY])))
  except (ValueError, KeyError, TypeError):
    return None


def parse_image_size(text: str) -> ImageSize:
  """'224' -> 224, '192x256' -> (192, 256): pixels.

  Raises:
    UserError: it is neither of the two.
  """
  try:
    numbers = [int(number) for number in text.split('x', maxsplit=1)]
  except ValueError as error:
    raise UserError(f'an image size is SIDE or HEIGHTxWIDTH, not {text!r}') from error
  return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def load(path: Path, options: Options, *, only_converted: bool = False) -> tuple[Weights, list[str]]:
  """Reads a converted file or a checkpoint, checks every tensor of it, and changes what `options` asks for.

  Args:
    path: the file.
    options: what the user says of it and wants changed.
    only_converted: refuse checkpoints, whose tensors may leave questions that `options` must answer.

  Returns:
    The weights, and notes for the user on what was found, chosen, dropped and changed.

  Raises:
    UserError: the file can't be read or does not hold exactly one model's tensors.
  """
  notes: list[str] = []
  try:
    kind = files.file_format(path)
    if kind == 'safetensors' and METADATA_KEY in files.read_metadata(path):
      found = _read(path)
      _check_agreement(found, options)
    elif only_converted:
      raise UserError('is no weight file of this package: convert it with convert_torch_weights.py first')
    else:
      found, notes = _import(path, kind, options)
    found, changes = _adapt(found, options)
  except UserError as error:
    raise files.problem(path, str(error)) from error
  return found, [*notes, *changes]


def load_classifier(path: Path, image_size: ImageSize | None = None) -> tuple[Weights, list[str]]:
  """Reads a converted file of a model that can classify pictures: it has a head, and knows how to prepare RGB images.

  Args:
    path: the file.
    image_size: px, if not the weights'.

  Returns:
    As `load`.

  Raises:
    UserError: as `load`, or the file is of another kind.
  """
  found, notes = load(path, Options(image_size=image_size), only_converted=True)
  colours = [found.channels, *(len(found.data.get(field, ())) for field in ('mean', 'std'))]
  if colours != [3, 3, 3] or not found.arguments['num_classes']:
    raise files.problem(path, 'holds no model with a head, and the mean and deviation of RGB images')
  return found, notes


def _import(path: Path, kind: files.Format, options: Options) -> tuple[Weights, list[str]]:
  """A checkpoint's weights under our paths."""
  checkpoint = read_checkpoint(path, kind, options.weights)
  shapes = {name: array.shape for name, array in checkpoint.tensors.items()}
  inferred = infer.infer_arguments(shapes, options.settings.get('image_size'))
  channels = infer.infer_channels(shapes)
  expected = _expected_shapes({'num_heads': 1, **inferred, **options.settings}, channels)
  rows = {key: names.to_torch(key, inferred['tokens_type']) for key in expected}
  _account(checkpoint.tensors, {name: kept.torch_shape(expected[key]) for key, (name, kept) in rows.items()})
  model, arguments = infer.name_model(inferred, options.settings, options.model_name)

  defaults = VARIANTS[model].data if model else DataDefaults()
  class_names = checkpoint.class_names
  found = Weights(
    arrays={key: transform.to_here(checkpoint.tensors[name]) for key, (name, transform) in rows.items()},
    model=model,
    arguments=arguments,
    channels=channels,
    data={**dataclasses.asdict(defaults), **(_CIFAR if checkpoint.cifar else {}), **_sizes(arguments)},
    class_names=class_names if class_names and len(class_names) == arguments['num_classes'] else None,
    source=dict(file=path.name, sha256=files.sha256(path), weights=checkpoint.weights),
  )
  shown = ', '.join(f'{field}={value}' for field, value in arguments.items())
  return found, [*checkpoint.notes, f'model: {model or "unnamed"} ({shown})']


def _expected_shapes(arguments: Mapping[str, Any], channels: int) -> dict[str, tuple[int, ...]]:
  """Path -> shape of every variable of the model, found without computing any."""
  model = T2TViT(**arguments)
  height, width = _sides(model.image_size)
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, height, width, channels))))
  return {key: leaf.shape for key, leaf in flatten_dict(variables, sep='/').items()}


def _account(arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
  """Raises a UserError that lists every tensor that is missing, left over, misshaped or not finite."""
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


_CHANGES = ('positions:', 'head:')  # how the notes of `_adapt` begin


def _adapt(found: Weights, options: Options) -> tuple[Weights, list[str]]:
  """The weights for the number of classes and the image size that `options` names."""
  arrays, arguments, class_names, notes = dict(found.arrays), dict(found.arguments), found.class_names, []
  if options.image_size not in (None, arguments['image_size']):
    old, new = (token_grid(_sides(size)) for size in (arguments['image_size'], options.image_size))
    arguments['image_size'] = options.image_size
    table = resize_position_embedding(jnp.asarray(arrays['frozen/pos_embed']), old, new)
    arrays['frozen/pos_embed'] = np.asarray(table)
    notes.append(f'positions: table resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} tokens')
  if options.num_classes not in (None, arguments['num_classes']):
    notes.append(f'head: {options.num_classes or "none"} instead of {arguments["num_classes"]} classes; not trained')
    arguments['num_classes'], class_names = options.num_classes, None
    arrays = {key: array for key, array in arrays.items() if not key.startswith('params/head/')}
    if options.num_classes:
      features = jnp.zeros(arrays['params/norm/scale'].shape)
      head = Dense(options.num_classes).init(jax.random.key(options.seed), features)['params']
      arrays.update({f'params/head/{key}': np.asarray(array) for key, array in head.items()})
  changes: dict[str, Any] = dict(arrays=arrays, arguments=arguments, class_names=class_names)
  return dataclasses.replace(found, data={**found.data, **_sizes(arguments)}, **changes), notes


def _sides(image_size: ImageSize) -> tuple[int, int]:
  return (image_size, image_size) if isinstance(image_size, int) else image_size


def _sizes(arguments: Mapping[str, Any]) -> dict[str, Any]:
  return {field: arguments[field] for field in ('image_size', 'num_classes')}


def _write(found: Weights, path: Path) -> None:
  from t2t_vit_jax import __version__  # not at the top: the package imports this module

  header = {METADATA_KEY: json.dumps({**found.metadata(), 'version': __version__})}
  arrays = {key: np.ascontiguousarray(array) for key, array in found.arrays.items()}
  safetensors.numpy.save_file(arrays, path, header)


def _write_torch(found: Weights, path: Path) -> None:
  torch = files.import_torch()
  state = {}
  for key, array in found.arrays.items():
    name, transform = names.to_torch(key, found.arguments['tokens_type'])
    state[name] = torch.from_numpy(np.array(transform.to_torch(array), order='C'))
  torch.save(state, path)


def _read(path: Path) -> Weights:
  """Reads what `_write` wrote, and checks it as closely as a stranger's file."""
  arrays = files.read_safetensors(path)
  try:
    metadata = _from_json(json.loads(files.read_metadata(path)[METADATA_KEY]))
    metadata.pop('version')
    found = Weights(arrays=arrays, **metadata)
    # A model of absurd size would take forever to describe; these bound it by what the file holds.
    height, width = token_grid(_sides(found.arguments['image_size']))
    table, stored = (1, 1 + height * width, found.arguments['embed_dim']), arrays['frozen/pos_embed'].shape
    blocks = found.arguments['depth'] + sum(found.arguments.get('dense_stages', ()))
    if stored != table or blocks > len(arrays):
      raise UserError(f'frozen/pos_embed is {stored}, not {table}, or most of {blocks} blocks are missing')
    expected = _expected_shapes(found.arguments, found.channels)
  except UserError:
    raise
  except Exception as error:  # JSON can hold anything
    raise UserError(f'its metadata describe no model: {type(error).__name__}: {error}') from error
  _account(arrays, expected)
  return found


def _check_agreement(found: Weights, options: Options) -> None:
  """Raises a UserError if the user says of a file of this package what it contradicts."""
  said = {'model': options.model_name, 'weights': options.weights, **options.settings}
  known = {'model': found.model, 'weights': found.source['weights'], **found.arguments}
  wrong = [f'{field}={known[field]}, not {value}' for field, value in said.items() if value not in (None, known[field])]
  if wrong:
    raise UserError(f'is a weight file with {", ".join(wrong)}')


def _from_json(value: Any) -> Any:
  """JSON with tuples for lists."""
  if isinstance(value, list):
    return tuple(_from_json(item) for item in value)
  return {key: _from_json(item) for key, item in value.items()} if isinstance(value, dict) else value
