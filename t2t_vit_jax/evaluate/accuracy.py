"""Evaluates weights on sets of images: a row of figures for each pair."""

from collections.abc import Callable
import dataclasses
import functools
import math
import os
import time
from types import SimpleNamespace
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np
from PIL import Image

from t2t_vit_jax.conversion import files, pretrained
from t2t_vit_jax.conversion.weight_format import ImageSize, Weights
from t2t_vit_jax.data.class_names import readable_names
from t2t_vit_jax.data.decoding import BadImage
from t2t_vit_jax.data.loader import Share, Workers
from t2t_vit_jax.data.sources import Source
from t2t_vit_jax.data.transforms import ResizeCenterCrop, pixels_of
from t2t_vit_jax.errors import DataError, UserError
from t2t_vit_jax.evaluate.reliability import summary
from t2t_vit_jax.evaluate.sets import ImageSet
from t2t_vit_jax.models.preprocessing import Normalization
from t2t_vit_jax.models.t2t_vit import T2TViT
from t2t_vit_jax.processes import code_digest, processes_on_this_host
from t2t_vit_jax.recipe import sharding, steps
from t2t_vit_jax.recipe.build import DTYPES
from t2t_vit_jax.recipe.evaluation import Evaluator
from t2t_vit_jax.recipe.run import choose_workers

Row = dict[str, Any]
# Fields of a row that say which evaluation it is of: with the same ones, it need not be made again.
IDENTITY = (
  'sha256',
  'set',
  'version',
  'fingerprint',
  'image_size',
  'crop_fraction',
  'interpolation',
  'orientation',
  'dtype',
  'scored_classes',
  'code',
)


@dataclasses.dataclass(frozen=True)
class Options:
  """Choices of the user for all weights and sets."""

  image_size: ImageSize | None = None  # px; None: the weights' own
  dtype: str = 'float32'  # of computation
  batch_size: int = 256  # images, of all devices
  all_classes: bool = False  # the model chooses among all its classes, also on sets of fewer
  allow_missing_classes: bool = False
  num_workers: int | None = None  # processes that read images; None: by processors and memory


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Weights to be evaluated."""

  name: str  # as the user wrote it
  weights: Weights
  sha256: str  # of their file
  num_bytes: int  # of their file

  @property
  def num_parameters(self) -> int:
    """Number of trained parameters."""
    return sum(array.size for path, array in self.weights.arrays.items() if path.startswith('params/'))

  @property
  def class_names(self) -> tuple[str, ...]:
    """Names of the classes for people."""
    return readable_names(self.weights.class_names, self.weights.arguments['num_classes'])


@dataclasses.dataclass(frozen=True)
class Pair:
  """Weights and a set of images that fit together."""

  candidate: Candidate
  image_set: ImageSet
  source: Source  # with the labels of the weights' classes
  classes: tuple[int, ...] | None  # labels of those that are scored; None for all
  options: Options

  @property
  def crop_fraction(self) -> float:
    """Share of the resized short side that is kept."""
    return 1.0 if self.image_set.is_cropped else self.candidate.weights.data['crop_fraction']

  def picture(self, index: int) -> Image.Image | None:
    """The image of a number; None if it cannot be read."""
    try:
      return self.source.image_of(self.source[index]).decode()
    except (BadImage, DataError, IndexError):
      return None

  @functools.cached_property
  def facts(self) -> Row:
    """Fields of the row that are known before the evaluation."""
    candidate, weights, source = self.candidate, self.candidate.weights, self.source
    return {
      'weights': candidate.name,
      'sha256': candidate.sha256,
      'model': weights.model,
      'parameters': candidate.num_parameters,
      'bytes': candidate.num_bytes,
      'set': self.image_set.name,
      'corruption': self.image_set.corruption,
      'version': self.image_set.version,
      'fingerprint': self.image_set.fingerprint,
      'image_size': weights.arguments['image_size'],
      'crop_fraction': self.crop_fraction,
      'interpolation': weights.data['interpolation'],
      'orientation': 'upright' if source.upright else 'ignored',
      'dtype': self.options.dtype,
      'scored_classes': len(source.class_names) if self.classes is None else len(self.classes),
      'code': code_digest(),  # of this package: another version may compute something else
    }

  @property
  def identity(self) -> tuple[Any, ...]:
    """Values that tell this evaluation from others."""
    return identity(self.facts)


def identity(row: Row) -> tuple[Any, ...]:
  """The fields `IDENTITY` of a row, as they are after a way through JSON."""
  values = (row.get(field) for field in IDENTITY)
  return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def open_candidate(name: str, image_size: ImageSize | None = None) -> Candidate:
  """Reads weights.

  Args:
    name: a weight file, a run's folder or a name; see `find_weights`.
    image_size: px; None for the image size of the weights.

  Raises:
    UserError: they can't be read, or are of no model that classifies pictures.
  """
  weights, _ = pretrained.load_classifier(name, image_size)
  path = pretrained.find_weights(name)
  return Candidate(os.fspath(name), weights, files.sha256(path), path.stat().st_size)


def fit(candidate: Candidate, image_set: ImageSet, options: Options) -> Pair:
  """Finds the classes of a set among those of weights.

  Raises:
    UserError: the set has classes that the weights don't know, or lacks some.
  """
  weights = candidate.weights
  try:
    source, classes = image_set.for_model(
      weights.class_names, weights.arguments['num_classes'], allow_missing=options.allow_missing_classes
    )
  except UserError as error:
    raise UserError(f'{candidate.name} on {image_set.name}: {error}') from error
  source = dataclasses.replace(source, upright=image_set.upright(weights.data))
  return Pair(candidate, image_set, source, None if options.all_classes else classes, options)


def build(candidate: Candidate, options: Options) -> tuple[T2TViT, dict[str, Any], Normalization]:
  """The model with the dtype that the user chose, its variables, and the normalization of its images."""
  model, variables = candidate.weights.build()
  data = candidate.weights.data
  return model.clone(dtype=DTYPES[options.dtype]), variables, Normalization(tuple(data['mean']), tuple(data['std']))


def prepared(candidate: Candidate, crop_fraction: float) -> ResizeCenterCrop:
  """The transform from a decoded image to one of the model's size."""
  weights = candidate.weights
  return ResizeCenterCrop(
    weights.arguments['image_size'], crop_fraction, weights.data['interpolation'], weights.channels
  )


def share_and_workers(
  options: Options, image_size: ImageSize, num_devices: int, source: Source
) -> tuple[Share, Workers]:
  """This process's part of each batch of a split, and its data workers. With several processes all must call it.

  Args:
    options: of the evaluation; its batch is rounded up to a multiple of the number of devices.
    image_size: px, of the model.
    num_devices: of all processes.
    source: the split.
  """
  count, batch_size = jax.process_count(), math.ceil(options.batch_size / num_devices) * num_devices
  settings = SimpleNamespace(num_workers=options.num_workers, num_threads=1, image_size=np.max(image_size))
  workers, _ = choose_workers(settings, batch_size // count, processes_on_this_host())
  return Share(batch_size, jax.process_index(), count), workers.for_images(len(source) // count)


class Runner:
  """Weights on the devices of a mesh, which are evaluated on one set after another."""

  def __init__(self, candidate: Candidate, options: Options, mesh: Mesh):
    self._model, variables, self._normalization = build(candidate, options)
    self._variables = jax.device_put(jax.device_get(variables), sharding.replicated(mesh))
    self._mesh = mesh
    self._step = functools.cache(self._make_step)

  def _make_step(self, classes: tuple[int, ...] | None) -> Any:
    step = steps.make_eval_step(self._model, normalization=self._normalization, classes=classes)
    return jax.jit(step, out_shardings=sharding.over_batch(self._mesh))

  def __call__(self, pair: Pair, warn: Callable[[str], None], progress: Callable[[int], object]) -> Row:
    """Evaluates; the throughput is that of reading and computing after compilation and the first batch.

    Raises:
      UserError: no image counts, the weights give no finite probabilities, or a label belongs to no class.
    """
    evaluator = self.evaluator(pair)
    self._compile(evaluator)
    starts = [(time.perf_counter(), 0)]  # and images that are done by then

    def note_time(number: int) -> None:
      if len(starts) == 1 and number < len(pair.source):  # the first of several batches
        starts.append((time.perf_counter(), number))
      progress(number)

    guesses = evaluator.guesses({'weights': self._variables}, warn, progress=note_time)['weights']
    end, (start, done) = time.perf_counter(), starts[-1]
    if not len(guesses.index):
      raise UserError(f'{pair.source.description}: none of the images has a label of the scored classes')
    if not np.isfinite(guesses.confidence).all():
      raise UserError(f'{pair.candidate.name} gives no finite probabilities: it is damaged, or of no trained model')
    return {
      **pair.facts,
      **guesses.accuracy(pair.source.class_names).as_dict(),
      'seconds': end - starts[0][0],
      'images_per_second': (len(pair.source) - done) / (end - start),
      'devices': f'{self._mesh.size} {jax.devices()[0].device_kind}',
      'reliability': summary(guesses),
    }

  def evaluator(self, pair: Pair) -> Evaluator:
    """The evaluation of a pair, not yet begun."""
    image_size = pair.candidate.weights.arguments['image_size']
    share, workers = share_and_workers(pair.options, image_size, self._mesh.size, pair.source)
    return Evaluator(
      step=self._step(pair.classes),
      source=pair.source,
      transform=prepared(pair.candidate, pair.crop_fraction),
      share=share,
      workers=workers,
      mesh=self._mesh,
      split=pair.image_set.name,
      classes=pair.classes,
    )

  def _compile(self, evaluator: Evaluator) -> None:
    """Computes a batch of black images, so that the program is there when the clock starts."""
    number, labels = evaluator.share.local_batch_size, evaluator.source.num_labels
    black = pixels_of(evaluator.transform(Image.new('RGB', (1, 1))))
    batch = {
      'image': np.broadcast_to(black, (number, *black.shape)),
      'label': np.zeros((number, labels) if labels > 1 else number, np.int32),
    }
    jax.block_until_ready(evaluator.step(self._variables, sharding.to_devices(batch, self._mesh)))
