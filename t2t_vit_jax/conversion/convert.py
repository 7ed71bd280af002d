"""Converts checkpoints to checked variables, to weight files of this package, and back to PyTorch."""

from collections.abc import Iterable, Mapping
import dataclasses
import io
import math
import os
from pathlib import Path
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from t2t_vit_jax.conversion import files, infer, names
from t2t_vit_jax.conversion.checkpoint import WeightsKind, read_checkpoint
from t2t_vit_jax.conversion.weight_format import (
  METADATA_KEY,
  ImageSize,
  Weights,
  check_tensors,
  expected_shapes,
  read_weights,
  sides,
  write_weights,
)
from t2t_vit_jax.errors import UserError, printable, require
from t2t_vit_jax.models.layers import Dense
from t2t_vit_jax.models.positions import resize_position_embedding
from t2t_vit_jax.models.preprocessing import for_channels
from t2t_vit_jax.models.soft_split import token_grid
from t2t_vit_jax.models.variants import VARIANTS, DataDefaults

PathLike = str | os.PathLike[str]

_CIFAR = dict(  # how the reference's CIFAR transfer prepares images
  crop_fraction=1.0, interpolation='bilinear', mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
)


@dataclasses.dataclass(frozen=True)
class Options:
  """Facts about a weight file, the first three fields, with which a converted file must agree; and changes to make."""

  model_name: str | None = None  #: where the tensors fit more than one named model
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  #: arguments that tensors don't show
  weights: WeightsKind | None = None  #: None: the moving average if the file has both
  num_classes: int | None = None  #: None: the file's head; another number: a fresh head; 0: no head
  image_size: ImageSize | None = None  #: px; another than the file's resizes the stored position table
  fresh_head: bool = False  #: even if the number of classes stays
  one_head: bool = False  #: drop the second head of token labeling; a fresh head always does
  seed: int = 0  #: of a fresh head

  def __post_init__(self) -> None:
    if unknown := self.settings.keys() - {'num_heads', 'qk_scale', 'image_size'}:
      raise UserError(f'settings are num_heads, qk_scale and image_size, not {" or ".join(sorted(unknown))}')
    numbers = [self.settings.get('num_heads', 1), self.settings.get('qk_scale', 1), 1 + (self.num_classes or 0)]
    if not all(0 < number < math.inf for number in numbers):
      raise UserError(f'num_heads and qk_scale must be positive, num_classes not negative: {self}')


def log_notes(path: PathLike, notes: Iterable[str]) -> None:
  """Logs the notes of `load`; changes of the weights are warnings."""
  for note in notes:
    level = logging.WARNING if note.startswith(_CHANGES) else logging.INFO
    logging.log(level, '%s', printable(f'{path}: {note}'))


def convert(
  path: PathLike, output: PathLike, options: Options, *, reverse: bool = False, force: bool = False
) -> list[str]:
  """Writes the weights of any file that `load` reads as a safetensors file of this package.

  With `reverse` it writes a plain state dict under the reference's names instead: a safetensors file if `output` ends
  so, else a PyTorch file, which needs torch. An existing `output` is an error unless `force` is set.

  Returns:
    Lines for the user: what was found, chosen, dropped and written.

  Raises:
    UserError: one line that names the file and every tensor at fault. No file was written.
  """
  output = Path(os.path.expanduser(output))
  files.check_output(output, force=force)
  weights, notes = load(Path(path), options)
  if reverse:
    _write_state_dict(weights, output)
  else:
    write_weights(weights, output)
  numbers = sum(array.size for array in weights.arrays.values())
  return [*notes, f'wrote {output}: {len(weights.arrays)} tensors, {numbers:,} numbers']


def parse_image_size(text: str) -> ImageSize:
  """'224' -> 224, '192x256' -> (192, 256): pixels.

  Raises:
    UserError: `text` has neither form.
  """
  try:
    numbers = [int(number) for number in text.split('x', maxsplit=1)]
  except ValueError as error:
    raise UserError(f'an image size is SIDE or HEIGHTxWIDTH, not {text!r}') from error
  return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def load(path: Path, options: Options, *, only_converted: bool = False) -> tuple[Weights, list[str]]:
  """Reads a converted file or a checkpoint, checks each of its tensors, and changes what `options` asks for.

  Args:
    path: the file.
    options: facts about the file, and changes to make.
    only_converted: refuse checkpoints, which may lack facts that `options` must give.

  Returns:
    The weights, and notes for the user on what was found, chosen, dropped and changed.

  Raises:
    UserError: the file can't be read or does not hold exactly one model's tensors.
  """
  notes: list[str] = []
  path = Path(os.path.expanduser(path))
  try:
    file_format = files.file_format(path)
    if file_format == 'safetensors' and METADATA_KEY in files.read_metadata(path):
      weights = read_weights(path)
      _check_agreement(weights, options)
    elif only_converted:
      raise UserError('is no weight file of this package: convert it with convert_torch_weights.py first')
    else:
      weights, notes = _import_checkpoint(path, file_format, options)
    weights, changes = _adapt(weights, options)
  except UserError as error:
    raise files.problem(path, str(error)) from error
  return weights, [*notes, *changes]


def _import_checkpoint(path: Path, file_format: files.Format, options: Options) -> tuple[Weights, list[str]]:
  """Reads a checkpoint's weights, under our paths."""
  checkpoint = read_checkpoint(path, file_format, options.weights)
  shapes = {name: array.shape for name, array in checkpoint.tensors.items()}
  inferred = infer.infer_arguments(shapes, options.settings.get('image_size'))
  channels = infer.infer_channels(shapes)
  expected = expected_shapes({'num_heads': 1, **inferred, **options.settings}, channels)
  rows = {key: names.to_torch(key, inferred['tokens_type']) for key in expected}
  torch_shapes = {name: transform.torch_shape(expected[key]) for key, (name, transform) in rows.items()}
  check_tensors(checkpoint.tensors, torch_shapes)
  model, arguments = infer.name_model(inferred, options.settings, options.model_name)

  defaults = VARIANTS[model].data if model else DataDefaults()
  data = {**dataclasses.asdict(defaults), **(_CIFAR if checkpoint.cifar else {}), **_data_sizes(arguments)}
  for field in ('mean', 'std'):
    data[field] = for_channels(data[field], channels)
  class_names = checkpoint.class_names
  weights = Weights(
    arrays={key: transform.to_here(checkpoint.tensors[name]) for key, (name, transform) in rows.items()},
    model=model,
    arguments=arguments,
    channels=channels,
    data=data,
    class_names=class_names if class_names and len(class_names) == arguments['num_classes'] else None,
    source=dict(file=path.name, sha256=files.sha256(*checkpoint.files), weights=checkpoint.weights),
  )
  shown = ', '.join(f'{field}={value}' for field, value in arguments.items())
  return weights, [*checkpoint.notes, f'model: {model or "unnamed"} ({shown})', _origins(model, options)]


def _origins(model: str | None, options: Options) -> str:
  """A line that says which arguments the tensors did not show, and where they come from."""
  origins = dict.fromkeys(options.settings, 'given')
  origins.setdefault('num_heads', f'those of {model}')
  origins.setdefault('qk_scale', 'assumed, head width ** -0.5')
  phrases = [f'{field} {origin}' for field, origin in sorted(origins.items())]
  return f'not from the tensors: {", ".join(phrases)}'


_CHANGES = ('positions:', 'head:', 'aux_head:')  # how the notes of `_adapt` begin


def _adapt(weights: Weights, options: Options) -> tuple[Weights, list[str]]:
  """Changes weights to the number of classes and the image size of `options`; returns them with notes for the user."""
  arrays, arguments, class_names, notes = dict(weights.arrays), dict(weights.arguments), weights.class_names, []
  if options.image_size not in (None, arguments['image_size']):
    old, new = (token_grid(sides(size)) for size in (arguments['image_size'], options.image_size))
    arguments['image_size'] = options.image_size
    table = resize_position_embedding(jnp.asarray(arrays['frozen/pos_embed']), old, new)
    arrays['frozen/pos_embed'] = np.asarray(table)
    notes.append(f'positions: table resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} tokens')
  old_number = arguments['num_classes']
  num_classes = old_number if options.num_classes is None else options.num_classes
  fresh_head = num_classes != old_number or options.fresh_head
  if arguments.get('token_labeling') and (fresh_head or options.one_head):
    reason = 'it is of the old classes' if fresh_head else "training uses the class token's head alone"
    notes.append(f'aux_head: dropped; {reason}')
    del arguments['token_labeling']
    arrays = {key: array for key, array in arrays.items() if not key.startswith('params/aux_head/')}
  if fresh_head:
    change = (
      'new, for other classes' if options.fresh_head else f'{num_classes or "none"} instead of {old_number} classes'
    )
    notes.append(f'head: {change}; it has yet to be trained')
    arguments['num_classes'], class_names = num_classes, None
    arrays = {key: array for key, array in arrays.items() if not key.startswith('params/head/')}
    if num_classes:
      features = jnp.zeros(arrays['params/norm/scale'].shape)
      head = Dense(num_classes).init(jax.random.key(options.seed), features)['params']
      arrays.update({f'params/head/{key}': np.asarray(array) for key, array in head.items()})
  changes: dict[str, Any] = dict(arrays=arrays, arguments=arguments, class_names=class_names)
  return dataclasses.replace(weights, data={**weights.data, **_data_sizes(arguments)}, **changes), notes


def _data_sizes(arguments: Mapping[str, Any]) -> dict[str, Any]:
  return {field: arguments[field] for field in ('image_size', 'num_classes')}


def _write_state_dict(weights: Weights, output: Path) -> None:
  """Writes the weights under the reference's names: as safetensors, or as a PyTorch file with torch's help."""
  state = {}
  for key, array in weights.arrays.items():
    name, transform = names.to_torch(key, weights.arguments['tokens_type'])
    state[name] = np.array(transform.to_torch(array), order='C')
  if output.suffix == '.safetensors':
    files.write_file(output, lambda temporary: safetensors.numpy.save_file(state, temporary, {'format': 'pt'}))
    return
  require(printable(str(output)), 'torch', advice=', or give --output=FILE.safetensors')
  import torch

  tensors = {name: torch.from_numpy(array) for name, array in state.items()}
  buffer = io.BytesIO()  # of a full disk, torch would say "unexpected pos 576 vs 534"
  torch.save(tensors, buffer)
  files.write_file(output, lambda temporary: temporary.write_bytes(buffer.getbuffer()), buffer.tell())


def _check_agreement(weights: Weights, options: Options) -> None:
  """Raises a UserError if the facts in `options` contradict the metadata of a file of this package."""
  given = {'model': options.model_name, 'weights': options.weights, **options.settings}
  known = {'model': weights.model, 'weights': weights.source['weights'], **weights.arguments}
  wrong = [f'{field}={known[field]}, not {x}' for field, x in given.items() if x not in (None, known[field])]
  if wrong:
    raise UserError(f'is a weight file with {", ".join(wrong)}')
