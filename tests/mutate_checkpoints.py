"""Damages a good checkpoint at random places, again and again: each must convert or be refused in one line.

As a program: `python -m tests.mutate_checkpoints COUNT [SEED]`; it prints a tally and fails on anything else.
"""

from collections import Counter
import io
from pathlib import Path
import random
import sys
import tempfile
import zipfile

import numpy as np

from t2t_vit_jax import UserError
from t2t_vit_jax.conversion import Options, convert, files
from tests import checkpoints

FORMS = ('timm', 'non-zip', 'cifar', 'mmpretrain')


def mutated(data, rng):
  """`data` with one to eight bytes changed, cut, doubled or swapped; half of the places in its header or directory."""
  data = bytearray(data)
  for _ in range(rng.randint(1, 8)):
    region = rng.choice((len(data), 4000, 12000))
    start = rng.randrange(min(region, len(data)))
    if rng.random() < 0.3:  # from the end, where a zip file has its directory
      start = len(data) - 1 - start
    length = rng.randint(1, 16)
    kind = rng.random()
    if kind < 0.7:
      data[start] = rng.choice((rng.randrange(256), data[start] ^ (1 << rng.randrange(8)), 0, 255))
    elif kind < 0.8:
      del data[start : start + length]
    elif kind < 0.9:
      data[start:start] = rng.randbytes(length)
    else:
      data[start : start + length] = data[start : start + length][::-1]
  return bytes(data)


def run(folder, count, seed):
  """Converts `count` damaged files in `folder` and counts what became of them.

  Raises:
    AssertionError: a file did anything but convert to finite tensors, or be refused in one line without a trace.
  """
  rng, outcomes = random.Random(seed), Counter()
  path, output = Path(folder) / 'mutated', Path(folder) / 'out.safetensors'
  originals = []
  for form in FORMS:
    checkpoints.save_form(form, path)
    originals.append(path.read_bytes())
  before = {path}
  for number in range(count):
    original = rng.choice(originals)
    if zipfile.is_zipfile(io.BytesIO(original)) and rng.random() < 0.7:
      path.write_bytes(original)  # checksums stop most damage to a zip file: this one has right ones
      checkpoints.edit_zip(path, '/data.pkl', lambda data: mutated(data, rng))
    else:
      path.write_bytes(mutated(original, rng))
    try:
      convert(path, output, Options(settings={'num_heads': 4}))
    except UserError as error:
      message = str(error)
      outcomes['refused'] += 1
      if not message.isprintable() or set(path.parent.iterdir()) != before:
        raise AssertionError(f'mutation {number} left a trace, or more than a line: {message}') from error
    else:
      assert all(np.isfinite(array).all() for array in files.read_safetensors(output).values()), number
      output.unlink()
      outcomes['converted'] += 1
  return outcomes


if __name__ == '__main__':
  count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
  with tempfile.TemporaryDirectory() as folder:
    print(f'{count} mutations, seed {seed}:', dict(run(folder, count, seed)))
