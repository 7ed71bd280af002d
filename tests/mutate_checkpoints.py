"""Damages a good checkpoint at random places, again and again: each must convert or be refused in one line.

As a program: `python -m tests.mutate_checkpoints COUNT [SEED]`; it prints a tally and fails on anything else. With
`headers COUNT [SEED]` it changes the metadata of a weight file instead: each must be used or refused by every tool.
"""

from collections import Counter
import contextlib
import copy
import io
import json
from pathlib import Path
import random
import sys
import tempfile
import zipfile

import numpy as np
from PIL import Image
import safetensors.numpy

from configs import digits
from t2t_vit_jax import UserError
from t2t_vit_jax.conversion import Options, convert, files
from t2t_vit_jax.conversion.convert import load
from t2t_vit_jax.export import export_weights
from t2t_vit_jax.predict import open_classifier, predict
from t2t_vit_jax.recipe.init_from import resolve, resolve_for_evaluation, weights_header
from tests import checkpoints, golden

FORMS = ('timm', 'non-zip', 'cifar', 'mmpretrain')
# Values that no field of a header, or only some of them, may have.
VALUES = (
  None, True, False, 0, 1, 3, -1, 0.5, 2**31, 10**400, 1e-300, 1e300, float('nan'), float('inf'), '', 'x', 'ema',
  'bicubic', 'dense', '\x1b[2J\rforged\nline', '\ud800', '9' * 9999, [], [0, 0, 0], [1, 1], [float('nan')] * 3, ['a'],
  [None] * 10, [[]], {}, {'a': [1]},
)  # fmt: skip


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


def damaged_header(metadata, rng):
  """The JSON of a header with a value changed, left out, added or doubled, or with its text damaged."""
  metadata = copy.deepcopy(metadata)
  kind = rng.random()
  if kind < 0.05:
    return '{"a":' * 100_000
  if kind < 0.15:
    return mutated(json.dumps(metadata).encode(), rng).decode('utf-8', 'replace')
  containers = [metadata, *(value for value in metadata.values() if isinstance(value, dict))]
  fields = rng.choice(containers)
  field = rng.choice(list(fields))
  if kind < 0.25:
    del fields[field]
  elif kind < 0.3:
    fields[rng.choice(('extra', 'dtype', 'remat', 'norm_layer', '\x1b[2J\n'))] = rng.choice(VALUES)
  elif kind < 0.5 and isinstance(fields[field], list) and fields[field]:
    fields[field][rng.randrange(len(fields[field]))] = rng.choice(VALUES)
  else:
    fields[field] = rng.choice(VALUES)
  return json.dumps(metadata)


def use(path, image):
  """Lets every tool use a weight file; raises the UserError of the first that refuses it."""
  with contextlib.suppress(UserError):
    weights_header(str(path))
    config = digits.get_config()
    config.init_from, config.model.name, config.data.orientation = str(path), None, None
    for field in ('crop_fraction', 'mean', 'std'):
      config.data[field] = None
    resolve(config)
  loaded = load(path, Options())[0]
  resolve_for_evaluation(digits.get_config(), loaded.data, loaded.channels, 'file')
  (prediction,) = predict(open_classifier(path), [str(image)])
  json.dumps(prediction)
  assert np.isfinite([guess.probability for guess in prediction.guesses]).all(), prediction
  export_weights(path, path.with_suffix('.npz'), force=True)


def run_headers(folder, count, seed, use=use):
  """Uses a weight file with `count` damaged headers, and counts what became of them.

  Raises:
    AssertionError: one was refused in more than a line.
    Exception: of a tool, for which a header must never be a reason.
  """
  rng, outcomes = random.Random(seed), Counter()
  path = golden.converted('performer', Path(folder))
  arrays, metadata = files.read_safetensors(path), json.loads(files.read_metadata(path)['t2t_vit_jax'])
  metadata['class_names'] = [f'name {label}' for label in range(10)]
  Image.new('RGB', (70, 80), 'red').save(Path(folder) / 'image.png')
  for number in range(count):
    header = damaged_header(metadata, rng)
    safetensors.numpy.save_file(arrays, path, {'t2t_vit_jax': header})
    try:
      use(path, Path(folder) / 'image.png')
      outcomes['used'] += 1
    except UserError as error:
      outcomes['refused'] += 1
      if not str(error).isprintable():
        raise AssertionError(f'header {number} is refused in more than a line: {error}') from error
    except Exception as error:
      error.add_note(f'header {number}: {header[:2000]}')
      raise
  return outcomes


if __name__ == '__main__':
  program, numbers = (run_headers, sys.argv[2:]) if sys.argv[1] == 'headers' else (run, sys.argv[1:])
  count, seed = int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0
  with tempfile.TemporaryDirectory() as folder:
    print(f'{count} mutations, seed {seed}:', dict(program(folder, count, seed)))
