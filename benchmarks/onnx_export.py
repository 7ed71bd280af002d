"""Exports every named model to ONNX at its own size, with random weights, and compares it with ONNX Runtime.

python -m benchmarks.onnx_export [MODEL ...]

Prints a row of docs/export.md's table for each model. Weights are drawn from N(0, 0.02) around Flax's starting values,
so that no bias is 0 and no scale 1.
"""

import argparse
import dataclasses
from pathlib import Path
import sys
import tempfile
import time

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np

import t2t_vit_jax
from t2t_vit_jax.conversion.weight_format import Weights, write_weights
from t2t_vit_jax.export import export_weights
from t2t_vit_jax.models.t2t_vit import ARCHITECTURE
from t2t_vit_jax.models.variants import DataDefaults


def write_random_weights(name: str, path: Path) -> None:
  """Writes a weight file of a named model with 1,000 classes."""
  model = t2t_vit_jax.create_model(name)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, model.image_size, model.image_size, 3)))
  random = np.random.default_rng(0)
  arrays = {
    key: np.asarray(array + 0.02 * random.standard_normal(array.shape), np.float32)
    for key, array in flatten_dict(variables, sep='/').items()
  }
  arguments = {field: getattr(model, field) for field in (*ARCHITECTURE, 'image_size', 'num_classes')}
  data = {**dataclasses.asdict(DataDefaults()), 'image_size': model.image_size}
  write_weights(Weights(arrays, name, arguments, 3, data, None, {'weights': None}), path)


def main() -> int:
  """Command line; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
  parser.add_argument('models', nargs='*', metavar='MODEL', help='names of models (default: all)')
  print('| model | file | largest difference | time of export |\n|---|---|---|---|', flush=True)
  for name in parser.parse_args().models or t2t_vit_jax.list_models():
    with tempfile.TemporaryDirectory() as folder:
      weights, output = Path(folder, 'random.safetensors'), Path(folder, 'random.onnx')
      write_random_weights(name, weights)
      start = time.perf_counter()
      *_, line = export_weights(weights, output, form='onnx')
      seconds = time.perf_counter() - start
      difference = line.partition('by up to ')[2].split(',')[0]
      print(f'| {name} | {output.stat().st_size / 1e6:.0f} MB | {difference} | {seconds:.0f} s |', flush=True)
  return 0


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  sys.exit(main())
