"""Computes the features of a split's images, and keeps them in a file."""

import collections
from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from t2t_vit_jax.conversion.files import write_file
from t2t_vit_jax.data.faults import MAX_NAMED, Faults
from t2t_vit_jax.data.loader import UNREADABLE, Share, Workers, eval_batches
from t2t_vit_jax.data.sources import Source
from t2t_vit_jax.data.transforms import EvalTransform
from t2t_vit_jax.errors import UserError, first_line
from t2t_vit_jax.models.preprocessing import Normalization
from t2t_vit_jax.models.t2t_vit import T2TViT
from t2t_vit_jax.predict import explaining_memory
from t2t_vit_jax.processes import gather_texts
from t2t_vit_jax.recipe.evaluation import MAX_BATCHES_IN_FLIGHT
from t2t_vit_jax.recipe.sharding import replicated, to_devices

Callback = Callable[[str], None]  # shows a line to the user


class Features(NamedTuple):
  """Features of a split's images, in the split's order, without the images that cannot be read."""

  cls: np.ndarray  # (N, D) float32, the class token
  mean: np.ndarray  # (N, D) float32, the mean of the other tokens
  label: np.ndarray  # (N,) int32


Result = tuple[Features, Any]  # of a batch: its features, and the mask (B,), 0 for padding; on devices or fetched


def extract(
  model: T2TViT,
  variables: dict[str, Any],
  prepare: EvalTransform,
  normalize: Normalization,
  source: Source,
  share: Share,
  workers: Workers,
  mesh: Mesh,
  warn: Callback,
  progress: Callable[[int], object] = lambda count: None,
) -> Features:
  """Computes the features of a split in one pass. With several processes all call it, and each gets all rows.

  Args:
    model: of any number of classes; its heads are not used.
    variables: of the model.
    prepare: from a decoded image to one of the model's size.
    normalize: from uint8 images to the model's input.
    source: the split.
    share: this process's part of each batch; the batch is rounded up to a multiple of the number of devices.
    workers: processes and threads that prepare the images.
    mesh: the devices.
    warn: gets a line for each image that cannot be read, up to `MAX_NAMED`, and one that counts the others.
    progress: gets the number of images of each batch when it is done.

  Raises:
    UserError: no image can be read, a batch does not fit into memory, or a feature is not finite.
    DataError: a label belongs to no class, or a worker died.
  """
  share = dataclasses.replace(share, batch_size=math.ceil(share.batch_size / mesh.size) * mesh.size)
  variables = jax.device_put(jax.device_get(variables), replicated(mesh))
  step, faults = _extract_step(model, normalize, mesh), Faults(source, warn, 'it is left out')
  with (
    explaining_memory(share.batch_size),
    contextlib.closing(eval_batches(source, prepare, share, workers)) as batches,
  ):
    results = _fetched(step(variables, to_devices(batch, mesh)) for batch in faults.check(batches))
    features = _joined(_readable(results, progress), len(source))
  if faults.num_bad > MAX_NAMED:
    warn(f'{faults.num_bad - MAX_NAMED:,} more images of {source.description} cannot be read; they are left out')
  if not len(features.label):
    raise UserError(f'no image of {source.description} can be read')
  return features


@functools.lru_cache(maxsize=1)  # the program for the training split is the test split's too
def _extract_step(
  model: T2TViT, normalize: Normalization, mesh: Mesh
) -> Callable[[dict[str, Any], dict[str, Any]], Result]:
  """Returns `step(variables, batch) -> (Features, mask)` of a batch; each device gets all rows."""

  def step(variables: dict[str, Any], batch: dict[str, Any]) -> Result:
    outputs: Any = model.apply(variables, normalize(batch['image']), features=True)
    cls, tokens = outputs.cls.astype(jnp.float32), outputs.tokens.astype(jnp.float32)
    return Features(cls, tokens.mean(axis=(1, 2)), batch['label']), batch['mask']

  return jax.jit(step, out_shardings=replicated(mesh))


def _fetched(results: Iterable[Result]) -> Iterator[Result]:
  """Fetches results from the devices in order; at most `MAX_BATCHES_IN_FLIGHT` are there at a time."""
  waiting: collections.deque[Result] = collections.deque()
  for result in results:
    waiting.append(result)
    if len(waiting) == MAX_BATCHES_IN_FLIGHT:
      yield jax.device_get(waiting.popleft())
  yield from map(jax.device_get, waiting)


def _readable(results: Iterable[Result], progress: Callable[[int], object]) -> Iterator[Features]:
  """Leaves out padding, and images that could not be read, of each batch.

  Raises:
    UserError: a feature is not finite.
  """
  for features, mask in results:
    features = Features(*(x[(mask > 0) & (features.label != UNREADABLE)] for x in features))
    if not (np.isfinite(features.cls).all() and np.isfinite(features.mean).all()):
      raise UserError(
        'the weights give features that are not finite: they are damaged, or not those of a trained model'
      )
    progress(int(mask.sum()))
    yield features


def _joined(parts: Iterator[Features], most: int) -> Features:
  """Joins parts with `most` rows at most; they are copied as they come, so that memory holds each row once."""
  first, count = next(parts), 0
  joined = Features(*(np.empty((most, *x.shape[1:]), x.dtype) for x in first))
  for part in itertools.chain([first], parts):
    for whole, rows in zip(joined, part, strict=True):
      whole[count : count + len(rows)] = rows
    count += len(part.label)
  return Features(*(x[:count] for x in joined))


def cached_features(
  file: Path, key: dict[str, Any], compute: Callable[[], Features], num_images: int, note: Callback, warn: Callback
) -> Features:
  """Reads features from `file` if it was written with this `key`; else computes them and replaces the file.

  With several processes all call it: the file is used if all can read it, and the first one writes it.

  Args:
    file: an .npz file, which need not exist, nor need its folder.
    key: JSON of all that the features depend on, such as a checksum of the weights, the image size and
      `Source.fingerprint`.
    compute: computes the features.
    num_images: of the split; features of fewer are not kept.
    note: gets a line that says that the file is used, or why it is not.
    warn: gets a line if the file cannot be written.
  """
  key = json.loads(json.dumps(key))  # tuples become lists, as in the file
  features, problem = _read_features(file, key)
  everywhere = all(gather_texts('read' if features else ''))
  if features and everywhere:
    note(f'features are read from {file}')
    return features
  if problem:
    note(f'{file} {problem}: the features are computed anew')
  features = compute()
  if jax.process_index() == 0 and len(features.label) == num_images:  # unreadable images may be readable next time
    try:
      _write_features(file, key, features)
    except (UserError, OSError) as error:
      warn(f'{error}; the features are not kept for the next time')
  return features


def _read_features(file: Path, key: dict[str, Any]) -> tuple[Features | None, str]:
  """Reads a file of `_write_features`: the features, or None and why they cannot be used; '' if there is no file."""
  try:
    # Opened here: numpy would leave a damaged file open.
    with file.open('rb') as opened, np.load(opened, allow_pickle=False) as stored:
      own = json.loads(str(stored['key']))
      if own != key:
        names = [name for name in sorted(own.keys() | key.keys()) if own.get(name) != key.get(name)]
        return None, f'was computed with other {", ".join(names)}'
      return Features(*(stored[name] for name in Features._fields)), ''
  except FileNotFoundError:
    return None, ''
  except Exception as error:  # a damaged file: libraries raise errors of many kinds
    return None, f'cannot be read ({first_line(error)})'


def _write_features(file: Path, key: dict[str, Any], features: Features) -> None:
  """Writes features with their key; numpy's format has a checksum of each array.

  Raises:
    UserError: the disk is full or the file cannot be written.
    OSError: its folder cannot be made.
  """

  def write(temporary: Path) -> None:
    with temporary.open('wb') as opened:  # given a name, numpy would add a suffix
      np.savez(opened, key=np.array(json.dumps(key)), **features._asdict())

  file.parent.mkdir(parents=True, exist_ok=True)
  write_file(file, write, needed=sum(x.nbytes for x in features))
