"""Writes the forward pass of a model and its weights as one file that jax runs without Flax and this package.

t2t-vit export WEIGHTS --output FILE

docs/export.md shows the few lines that load it.
"""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import sys
from typing import Any, cast

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
from t2t_vit_jax.models.preprocessing import Normalization
from t2t_vit_jax.models.t2t_vit import T2TViT

PLATFORMS = ('cpu', 'cuda', 'tpu')
DTYPES = ('float32', 'bfloat16')

Array = jax.Array


def export_weights(
  source: str | os.PathLike[str],
  output: Path,
  *,
  dtype: str = 'float32',
  image_size: ImageSize | None = None,
  force: bool = False,
) -> list[str]:
  """Writes a model with its weights as an .npz file: the program, its weights and a description.

  Its arrays are `program`, the serialized `export_forward`; `metadata`, JSON; and the weights, each under its path.

  Args:
    source: a weight file, a run's folder or a name; see `find_weights`.
    output: the file to write.
    dtype: of the computation, one of `DTYPES`; weights and logits are float32.
    image_size: px, one side or (height, width), if not the weights'.
    force: overwrite `output`.

  Returns:
    Lines for the user: what was changed and written.

  Raises:
    UserError: one line that names the file at fault. No file was written.
  """
  files.check_output(output, force=force)
  loaded, notes = pretrained.load_classifier(source, image_size)
  program = export_forward(loaded, dtype)
  metadata = json.dumps(_metadata(loaded, dtype, program))
  serialized = np.frombuffer(program.serialize(), np.uint8)

  def write(temporary: Path) -> None:
    arrays: dict[str, Any] = {'program': serialized, 'metadata': np.array(metadata), **loaded.arrays}
    with temporary.open('wb') as file:  # given a name, savez would change its ending
      np.savez(file, **arrays)

  files.write_file(output, write)
  images, logits = program.in_avals[-1], program.out_avals[0]
  size = f'{output.stat().st_size / 1e6:.1f} MB'
  return [*notes, f'wrote {output}: {images.str_short()} -> {logits.str_short()}, for {", ".join(PLATFORMS)}, {size}']


def export_forward(loaded: Weights, dtype: str) -> export.Exported:
  """The forward pass: float32 weights by path, uint8 images (B, height, width, C) -> float32 logits (B, num_classes).

  B is a dimension variable, at least 1, and images are normalised within. Weights are arguments, since as constants of
  the program they would be compiled, and held, anew for each batch size.
  """
  model = T2TViT(**{**loaded.arguments, 'dtype': jnp.dtype(dtype)})
  normalize = Normalization(loaded.data['mean'], loaded.data['std'])

  def forward(weights: dict[str, Array], images: Array) -> Array:
    return cast(Array, model.apply(unflatten_dict(weights, sep='/'), normalize(images)))

  weights = {key: jax.ShapeDtypeStruct(array.shape, array.dtype) for key, array in loaded.arrays.items()}
  images = jax.ShapeDtypeStruct((*export.symbolic_shape('B'), *_sides(loaded), loaded.channels), jnp.uint8)
  with _no_source_paths():
    return export.export(jax.jit(forward), platforms=PLATFORMS)(weights, images)


def _sides(loaded: Weights) -> list[int]:
  """[height, width] in px."""
  return np.broadcast_to(loaded.arguments['image_size'], 2).tolist()


def _metadata(loaded: Weights, dtype: str, program: export.Exported) -> dict[str, Any]:
  """Facts that a user of the program must know, and where it comes from."""
  return {
    **loaded.data,
    'image_size': _sides(loaded),
    'class_names': loaded.class_names,
    'model': loaded.model,
    'dtype': dtype,
    'platforms': program.platforms,
    'calling_convention_version': program.calling_convention_version,
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
  parser.add_argument('--output', required=True, metavar='FILE', type=Path, help='.npz file to write')
  parser.add_argument(
    '--dtype', choices=DTYPES, default=DTYPES[0], help='precision of the computation (default: %(default)s)'
  )
  parser.add_argument(
    '--image_size', metavar='SIZE', help="image size in px, SIDE or HEIGHTxWIDTH (default: the weights')"
  )
  parser.add_argument('--force', action='store_true', help='overwrite the output')

  def run() -> int:
    arguments = parser.parse_args(argv)
    size = None if arguments.image_size is None else parse_image_size(arguments.image_size)
    options = dict(dtype=arguments.dtype, image_size=size, force=arguments.force)
    for line in export_weights(arguments.weights, arguments.output, **options):
      print(line)
    return 0

  return run_tool(run)


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')  # lowering needs no accelerator
  sys.exit(main())
