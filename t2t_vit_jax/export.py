"""Writes a model's forward pass and its weights as one file that jax or an ONNX runtime runs without this package.

t2t-vit export WEIGHTS --output FILE

docs/export.md shows the few lines that load it.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import importlib.metadata
import json
import logging
import os
from pathlib import Path
import sys
from typing import Any

from flax.traverse_util import unflatten_dict
import jax
from jax import export
import jax.numpy as jnp
import jaxlib
import numpy as np

from t2t_vit_jax import __version__
from t2t_vit_jax.command_line import Parser, run_tool
from t2t_vit_jax.conversion import files, parse_image_size, pretrained
from t2t_vit_jax.conversion.weight_format import ImageSize, Weights
from t2t_vit_jax.errors import UserError, first_line, readable_size, require
from t2t_vit_jax.models.layer_outputs import attention_blocks, layer_outputs
from t2t_vit_jax.models.preprocessing import Normalization
from t2t_vit_jax.models.t2t_vit import T2TViT, classify

PLATFORMS = ('cpu', 'cuda', 'tpu')
DTYPES = ('float32', 'bfloat16')
FORMATS = ('npz', 'onnx')
OPSET = 18  # of ONNX
ONNX_TOLERANCE = 1e-4  # between ONNX Runtime's results and the model's, for results of up to 1

Array = jax.Array


def export_weights(
  source: str | os.PathLike[str],
  output: Path,
  *,
  form: str = 'npz',
  dtype: str = 'float32',
  attention: bool = False,
  image_size: ImageSize | None = None,
  force: bool = False,
) -> list[str]:
  """Writes a model with its weights as one file: the program, its weights and a description.

  The arrays of an .npz file are `program`, the serialized `export_forward`; `metadata`, JSON; and the weights, each
  under its path. An ONNX file holds the weights as constants, and each entry of the metadata as JSON.

  Args:
    source: a weight file, a run's folder or a name; see `find_weights`.
    output: the file to write.
    form: one of `FORMATS`.
    dtype: of the computation, one of `DTYPES`; weights and logits are float32.
    attention: whether the program also returns `class_attention`.
    image_size: px, one side or (height, width), if not the weights'.
    force: overwrite `output`.

  Returns:
    Lines for the user: what was changed and written.

  Raises:
    UserError: one line that names the file at fault. No file was written.
  """
  files.check_output(output, force=force)
  if form == 'onnx':
    _check_onnx(dtype)
  loaded, notes = pretrained.load_classifier(source, image_size)
  write = _write_onnx if form == 'onnx' else _write_npz
  about = write(loaded, output, dtype, attention)
  return [*notes, f'wrote {output}: {about}, {readable_size(output.stat().st_size)}']


def _write_npz(loaded: Weights, output: Path, dtype: str, attention: bool) -> str:
  program = export_forward(loaded, dtype, attention=attention)
  facts = {'platforms': program.platforms, 'calling_convention_version': program.calling_convention_version}
  metadata = np.array(json.dumps(_metadata(loaded, dtype, attention, facts)))
  serialized = np.frombuffer(program.serialize(), np.uint8)

  def write(temporary: Path) -> None:
    arrays: dict[str, Any] = {'program': serialized, 'metadata': metadata, **loaded.arrays}
    with temporary.open('wb') as file:  # given a name, savez would change its ending
      np.savez(file, **arrays)

  files.write_file(output, write)
  results = ', '.join(aval.str_short() for aval in program.out_avals)
  return f'{program.in_avals[-1].str_short()} -> {results}, for {", ".join(PLATFORMS)}'


def export_forward(loaded: Weights, dtype: str, *, attention: bool = False) -> export.Exported:
  """The forward pass: float32 weights by path, uint8 images (B, height, width, C) -> float32 logits (B, num_classes).

  With `attention` it returns logits and `class_attention`. B is a dimension variable, at least 1, and images are
  normalised within. Weights are arguments, since as constants of the program they would be compiled, and held, anew for
  each batch size.
  """
  model = T2TViT(**{**loaded.arguments, 'dtype': jnp.dtype(dtype)})
  weights = {key: jax.ShapeDtypeStruct(array.shape, array.dtype) for key, array in loaded.arrays.items()}
  images = jax.ShapeDtypeStruct((*export.symbolic_shape('B'), *_sides(loaded), loaded.channels), jnp.uint8)
  with _no_source_paths():
    return export.export(jax.jit(_forward(model, loaded, attention)), platforms=PLATFORMS)(weights, images)


def _forward(model: T2TViT, loaded: Weights, attention: bool) -> Callable[[dict[str, Array], Array], Any]:
  """A function (weights by path, uint8 images) -> logits, or (logits, class attention)."""
  normalize = Normalization(loaded.data['mean'], loaded.data['std'])
  image = jax.ShapeDtypeStruct((1, *_sides(loaded), loaded.channels), jnp.float32)
  blocks = attention_blocks(model, unflatten_dict(loaded.arrays, sep='/'), image) if attention else []

  def forward(weights: dict[str, Array], images: Array) -> Any:
    variables = unflatten_dict(weights, sep='/')
    if attention:
      return class_attention(model, variables, normalize(images), blocks)
    return model.apply(variables, normalize(images))

  return forward


def class_attention(
  model: T2TViT, variables: dict[str, Any], images: Array, blocks: Sequence[str]
) -> tuple[Array, Array]:
  """Logits, and the class token's attention to the image's tokens, in the mean over heads: (B, blocks, H, W).

  Args:
    model: any `T2TViT` with a head.
    variables: the model's.
    images: (B, height, width, C), normalised.
    blocks: names of encoder blocks, from `attention_blocks`.
  """
  layers = [f'{block}/attn/attention' for block in blocks]
  features, outputs = layer_outputs(model, variables, images, layers)
  attention = jnp.stack([outputs[layer][:, :, 0, 1:].mean(axis=1) for layer in layers], axis=1)
  attention = attention.reshape(*attention.shape[:2], *features.tokens.shape[1:3])
  return classify(model, variables, features), attention.astype(jnp.float32)


def _check_onnx(dtype: str) -> None:
  """Raises UserError unless a model can be converted to ONNX here."""
  if dtype != 'float32':
    raise UserError(f'ONNX files compute in float32: leave out --dtype={dtype}')
  require('--format=onnx', 'jax2onnx', 'onnx', 'onnxruntime')


def _write_onnx(loaded: Weights, output: Path, dtype: str, attention: bool) -> str:
  """Converts, writes, and compares what ONNX Runtime computes with the model's results; returns what it found."""
  import onnx

  program = onnx_program(loaded, attention)
  facts = {'opset': OPSET, 'converter': f'jax2onnx {importlib.metadata.version("jax2onnx")}'}
  metadata = _metadata(loaded, dtype, attention, facts)
  onnx.helper.set_model_props(program, {key: json.dumps(value) for key, value in metadata.items()})
  differences: list[float] = []

  def write(temporary: Path) -> None:
    temporary.write_bytes(program.SerializeToString())
    differences.append(_check_results(loaded, temporary, attention, output))

  files.write_file(output, write)
  sides = ','.join(map(str, (*_sides(loaded), loaded.channels)))
  results = f'float32[B,{loaded.arguments["num_classes"]}]' + (' and attention' if attention else '')
  return f"uint8[B,{sides}] -> {results}, ONNX Runtime's results differ from the model's by up to {differences[0]:.1e}"


def onnx_program(loaded: Weights, attention: bool = False) -> Any:
  """The forward pass as an `onnx.ModelProto`: `images` as in `export_forward` -> `logits` and perhaps `attention`.

  The converter lacks some of the fast forms' operations, and knows those of the definitions.

  Raises:
    UserError: the converter fails.
  """
  for library in ('jax2onnx', 'onnx_ir'):  # they warn of what this model does not use
    logging.getLogger(library).setLevel(logging.ERROR)
  from jax2onnx import to_onnx

  model = T2TViT(**{**loaded.arguments, 'soft_split_form': 'patches', 'token_attention_form': 'full'})
  forward, weights = _forward(model, loaded, attention), jax.tree.map(jnp.asarray, loaded.arrays)
  images = jax.ShapeDtypeStruct(('B', *_sides(loaded), loaded.channels), jnp.uint8)
  names = ['logits', 'attention'] if attention else ['logits']
  try:
    options: dict[str, Any] = dict(model_name='t2t_vit', opset=OPSET, input_names=['images'], output_names=names)
    return to_onnx(lambda images: forward(weights, images), [images], **options)
  except Exception as error:  # of any kind: it is not our code
    raise UserError(f'jax2onnx cannot convert this model: {first_line(error)}') from error


def _check_results(loaded: Weights, path: Path, attention: bool, output: Path) -> float:
  """The largest difference between ONNX Runtime's results and the model's, for random images in batches of 1 and 3.

  Raises:
    UserError: it is larger than `ONNX_TOLERANCE` times the largest result (at least 1), or no number.
  """
  import onnxruntime

  forward = jax.jit(_forward(T2TViT(**loaded.arguments), loaded, attention))
  largest = 0.0
  try:
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for batch in (1, 3):
      shape = (batch, *_sides(loaded), loaded.channels)
      images = np.random.default_rng(batch).integers(0, 256, shape, dtype=np.uint8)
      expected = jax.tree.leaves(jax.device_get(forward(loaded.arrays, images)))
      for y, wanted in zip(session.run(None, {'images': images}), expected, strict=True):
        difference = float(np.abs(y - wanted).max())
        if not difference <= ONNX_TOLERANCE * max(1, np.abs(wanted).max()):  # also if it is no number
          raise files.problem(
            output, f"not written: ONNX Runtime's results differ from the model's by {difference:.1e}"
          )
        largest = max(largest, difference)
  except UserError:
    raise
  except Exception as error:  # ONNX Runtime has a class of errors for each of its codes
    raise files.problem(output, f'not written: ONNX Runtime cannot run it: {first_line(error)}') from error
  return largest


def _sides(loaded: Weights) -> list[int]:
  """[height, width] in px."""
  return np.broadcast_to(loaded.arguments['image_size'], 2).tolist()


def _metadata(loaded: Weights, dtype: str, attention: bool, facts: dict[str, Any]) -> dict[str, Any]:
  """Facts that a user of the program must know, those of its format among them, and where it comes from."""
  return {
    **loaded.data,
    'image_size': _sides(loaded),
    'class_names': loaded.class_names,
    'model': loaded.model,
    'dtype': dtype,
    'outputs': ['logits', 'attention'] if attention else ['logits'],
    **facts,
    'versions': {'jax': jax.__version__, 'jaxlib': jaxlib.__version__, 't2t_vit_jax': __version__},
    'source': loaded.source,
  }


@contextlib.contextmanager
def _no_source_paths() -> Iterator[None]:
  """Leaves the paths of Python files, which every operation would carry, out of lowered programs."""
  option = 'jax_traceback_in_locations_limit'
  limit = getattr(jax.config, option)
  jax.config.update(option, 0)
  try:
    yield
  finally:
    jax.config.update(option, limit)


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = Parser(
    'export', example='t2t-vit export t2t_vit_14 --output=t2t_vit_14.npz', description=__doc__.split('\n\n')[0]
  )
  parser.add_argument('weights', metavar='WEIGHTS', help=pretrained.HELP)
  parser.add_argument('--output', required=True, metavar='FILE', type=Path, help='.npz or .onnx file to write')
  parser.add_argument('--format', choices=FORMATS, help='format of the file (default: by the ending of its name)')
  parser.add_argument(
    '--dtype', choices=DTYPES, default=DTYPES[0], help='precision of the computation (default: %(default)s)'
  )
  parser.add_argument(
    '--attention', action='store_true', help="return the class token's attention in each block too, (B, blocks, H, W)"
  )
  parser.add_argument(
    '--image_size', metavar='SIZE', help="image size in px, SIDE or HEIGHTxWIDTH (default: the weights')"
  )
  parser.add_argument('--force', action='store_true', help='overwrite the output')

  def run() -> int:
    arguments = parser.parse_args(argv)
    size = None if arguments.image_size is None else parse_image_size(arguments.image_size)
    jax.config.update('jax_platforms', 'cpu')  # lowering needs no accelerator
    form = arguments.format or arguments.output.suffix[1:].lower()
    if form not in FORMATS:
      raise UserError(f'--output {arguments.output}: the name must end with .npz or .onnx')
    options = dict(form=form, dtype=arguments.dtype, attention=arguments.attention, image_size=size)
    for line in export_weights(arguments.weights, arguments.output, **options, force=arguments.force):
      print(line)
    return 0

  return run_tool(run)


if __name__ == '__main__':
  sys.exit(main())
