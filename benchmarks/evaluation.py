"""Measures exact evaluation beside a plain loop over the same batches: `python -m benchmarks.evaluation`.

  plain       computes the logits of each batch, one batch ahead, and adds up on the host whether the largest is right
  evaluation  `recipe.evaluation`: the five likeliest classes, confidence and loss of each image, and all sums
  memory      of the process when an evaluation of the first fifth of the images has ended, and of all

Images are one batch, repeated: nothing is read. Both are timed in turn; medians, with minimum and maximum.
"""

import argparse
from collections.abc import Callable, Iterator
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from benchmarks import common
from t2t_vit_jax import create_model
from t2t_vit_jax.models.preprocessing import Normalization
from t2t_vit_jax.recipe import sharding, steps
from t2t_vit_jax.recipe.evaluation import run_batches, score

NORMALIZATION = Normalization((0.5,) * 3, (0.25,) * 3)


def plain_loop(model: Any, variables: Any, mesh: Any) -> Callable[[Iterator[dict[str, np.ndarray]]], int]:
  """Returns a loop over batches that counts the right guesses."""
  guesses_of = jax.jit(lambda variables, images: jnp.argmax(model.apply(variables, NORMALIZATION(images)), axis=1))

  def count(batches: Iterator[dict[str, np.ndarray]]) -> int:
    right, waiting = 0, None
    for batch in batches:
      on_devices = sharding.to_devices({'image': batch['image']}, mesh)
      ahead = guesses_of(variables, on_devices['image']), batch['label']
      if waiting is not None:
        right += int((np.asarray(waiting[0]) == waiting[1]).sum())
      waiting = ahead
    assert waiting is not None
    return right + int((np.asarray(waiting[0]) == waiting[1]).sum())

  return count


def evaluation(model: Any, variables: Any, mesh: Any) -> Callable[[Iterator[dict[str, np.ndarray]]], int]:
  """Returns the same by the package's evaluation."""
  step = jax.jit(steps.make_eval_step(model, normalization=NORMALIZATION), out_shardings=sharding.over_batch(mesh))

  def count(batches: Iterator[dict[str, np.ndarray]]) -> int:
    outcomes, labels = run_batches(step, {'weights': variables}, batches, mesh)
    outcome = outcomes['weights']
    guesses = score(labels, outcome['best'], outcome['confidence'], outcome['loss'])
    return guesses.accuracy([''] * model.num_classes).correct

  return count


def resident_bytes() -> int:
  """Memory of this process, on Linux."""
  with open('/proc/self/statm') as file:
    return int(file.read().split()[1]) * 4096


def repeated(batch: dict[str, np.ndarray], number: int) -> Iterator[dict[str, np.ndarray]]:
  """The same batch, each time as new arrays."""
  for _ in range(number):
    yield {name: array.copy() for name, array in batch.items()}


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', default='t2t_vit_tiny', help='default: %(default)s')
  parser.add_argument('--image-size', type=int, default=32, help='px (default: %(default)s)')
  parser.add_argument('--images', type=int, default=50_000, help='default: %(default)s')
  parser.add_argument('--batch-size', type=int, default=250, help='default: %(default)s')
  parser.add_argument('--rounds', type=int, default=5, help='default: %(default)s')
  arguments = parser.parse_args()
  size, number = arguments.image_size, arguments.images // arguments.batch_size
  model = create_model(arguments.model, image_size=size, num_classes=1000)
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (arguments.batch_size, size, size, 3), np.uint8),
    'label': rng.integers(0, 1000, arguments.batch_size).astype(np.int32),
  }
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
  mesh = sharding.make_mesh(ConfigDict({'data': -1, 'fsdp': 1}))
  ways = {name: make(model, variables, mesh) for name, make in (('plain', plain_loop), ('evaluation', evaluation))}
  counts = {name: way(repeated(batch, 2)) for name, way in ways.items()}  # compiles
  assert len(set(counts.values())) == 1, counts
  memory = []
  for part in (number // 5, number):
    ways['evaluation'](repeated(batch, part))
    memory.append(resident_bytes() / 1e6)

  def rate(way: Callable[[Iterator[dict[str, np.ndarray]]], int]) -> float:
    start = time.perf_counter()
    way(repeated(batch, number))
    return images / (time.perf_counter() - start)

  images = number * arguments.batch_size
  rates = common.in_turn({name: functools.partial(rate, way) for name, way in ways.items()}, arguments.rounds)
  for name, values in rates.items():
    print(f'{name}: {common.spread(values, 0)} images/s')
  ratios = (ours / plain for plain, ours in zip(rates['plain'], rates['evaluation'], strict=True))
  print(f'throughput of evaluation / plain: {common.spread(ratios, 3)}')
  print(f'memory after {images // 5:,} and {images:,} images: {memory[0]:.1f} and {memory[1]:.1f} MB')


if __name__ == '__main__':
  main()
