"""Throughput of the training input pipeline on the host: `python -m benchmarks.input_pipeline`.

Measures the published recipe's pipeline, from JPEG files to batches of uint8 images of 224 x 224 px, beside the same
operations in a plain Pillow loop, and decoding and cropping beside tf.data's where TensorFlow is installed. In each
round all of them take their turn on the same images, and ratios are taken within a round. Needs the extra `fast`.
"""

import argparse
import collections
from collections.abc import Callable, Iterator
import contextlib
import importlib.util
import io
import itertools
import json
import os
from pathlib import Path
import statistics
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from benchmarks import common
from configs import default
from t2t_vit_jax.data import loader, transforms
from t2t_vit_jax.data.pipeline import train_transform
from t2t_vit_jax.data.randaugment import OPERATIONS
from t2t_vit_jax.data.sources import Source, open_folder
from t2t_vit_jax.recipe.init_from import resolve

SEED = 0
# Batches that a loader may have ready: they are taken out before the clock starts.
BUFFERED_BATCHES = 6
PACKAGES = ('Pillow', 'cykooz-resizer', 'simplejpeg', 'grain', 'numpy', 'tensorflow', 'tensorflow-cpu')
# Width, height and how often: most photographs in ImageNet come from a site that scaled them to 500 px.
SIZES = {
  (500, 375): 10, (375, 500): 3, (500, 333): 4, (333, 500): 2,
  (500, 500): 1, (400, 300): 1, (640, 480): 1, (300, 225): 1,
}  # fmt: skip
QUALITY = 95  # with the noise below: 110 KB on average, as in ImageNet

NAMES = ('plain Pillow', 'exact', 'fast_decode')
PLAIN_LOOP = 'plain Pillow, loop'
TF_DATA = 'tf.data on one thread, without RandAugment'
CROP_STAGES = ('read', 'decode, crop', 'resize')

Lap = Callable[[str], None]


def noise(rng: np.random.Generator, width: int, height: int, slope: float) -> np.ndarray:
  """(height, width) noise of deviation 1 whose amplitude falls with frequency to the power of `slope`."""
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
  frequency[0, 0] = np.inf
  spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
  field = np.fft.irfft2(spectrum / frequency**slope, (height, width))
  return field / field.std()


def photograph(rng: np.random.Generator) -> Image.Image:
  """Overlapping shapes, whose edges are sharp, under noise with the spectrum of natural images."""
  sizes = list(SIZES)
  width, height = sizes[rng.choice(len(sizes), p=np.array(list(SIZES.values())) / sum(SIZES.values()))]
  image = Image.new('RGB', (width, height), tuple(rng.integers(60, 200, 3).tolist()))
  draw = ImageDraw.Draw(image)
  for shape in (draw.ellipse, draw.rectangle) * 6:
    left, top, shape_width, shape_height = rng.integers((-50, -50, 20, 20), (width, height, 200, 200)).tolist()
    shape((left, top, left + shape_width, top + shape_height), fill=tuple(rng.integers(0, 256, 3).tolist()))
  brightness = 25 * noise(rng, width, height, 1.1)
  colour = 20 * np.stack([noise(rng, width, height, 1.5) for _ in range(3)], axis=-1)
  return Image.fromarray(np.clip(image + brightness[..., None] + colour, 0, 255).astype(np.uint8))


def write_images(folder: Path, number: int) -> None:
  """Writes `number` JPEG files as the split 'train' of an image folder."""
  rng = np.random.default_rng(SEED)
  (folder / 'train' / 'made').mkdir(parents=True)
  for i in range(number):
    photograph(rng).save(folder / 'train' / 'made' / f'{i:05}.JPEG', quality=QUALITY, subsampling='4:2:0')


class Clock:
  """Adds up the seconds of each stage."""

  def __init__(self) -> None:
    self.seconds: dict[str, float] = collections.defaultdict(float)

  def start(self) -> None:
    self._last = time.perf_counter()

  def lap(self, stage: str) -> None:
    now = time.perf_counter()
    self.seconds[stage] += now - self._last
    self._last = now


class Pipeline:
  """The recipe on one source, with the position of an example in the training order as its number."""

  def __init__(self, source: Source, batch_size: int, *, fast: bool = False):
    config = default.get_config()
    config.data.fast_decode = fast
    self.source, self.batch_size = source, batch_size
    self.transform: Any = train_transform(resolve(config))
    self.order = loader.TrainOrder(len(source), batch_size, SEED)

  def batches(self, num_workers: int) -> Any:
    """Endless batches from the loader."""
    return loader.train_batches(
      self.source,
      self.transform,
      loader.TrainOrder(len(self.source), self.batch_size, SEED),
      loader.Share(self.batch_size),
      loader.Workers(num_workers),
      first_step=0,
      last_step=10**6,
    )

  def draw(self, position: int) -> tuple[int, np.random.Generator]:
    """(record, generator) at a position."""
    epoch, index = self.order(position)
    return index, np.random.default_rng((SEED, epoch, index))

  def example(self, position: int, lap: Lap) -> np.ndarray:
    """Computes what the loader does for one example, stage by stage."""
    crop, augmentations = self.transform.crop, self.transform.augmentations
    index, rng = self.draw(position)
    record = self.source[index]
    lap('read')
    file = transforms.EncodedImage(record.image)
    box = crop.draw_box(file.width, file.height, rng)
    interpolation = crop.interpolations[rng.integers(len(crop.interpolations))]
    image = file.crop(box, fast=crop.fast)
    lap('decode, crop')
    image = (transforms.fast_resize if crop.fast else plain_resize)(image, crop.size, interpolation)
    lap('resize')
    for augmentation in augmentations:
      image = augmentation(image, rng)
    lap('flip, RandAugment')
    array = np.asarray(image)
    lap('batch')
    return array


class PlainPipeline(Pipeline):
  """The same operations as a PyTorch user's dataset has them: one after the other, with Pillow."""

  def __init__(self, source: Source, batch_size: int):
    super().__init__(source, batch_size)
    records: Any = source.records
    self.paths = [records.folder / os.fsdecode(name) for name in records.names]
    self.operations = list(OPERATIONS.values())

  def example(self, position: int, lap: Lap) -> np.ndarray:
    crop, (flip, randaugment) = self.transform.crop, self.transform.augmentations
    index, rng = self.draw(position)
    with self.paths[index].open('rb') as file:
      encoded = io.BytesIO(file.read())
    lap('read')
    image = Image.open(encoded).convert('RGB')
    box = crop.draw_box(image.width, image.height, rng)
    interpolation = crop.interpolations[rng.integers(len(crop.interpolations))]
    image = image.crop(box)
    lap('decode, crop')
    image = plain_resize(image, crop.size, interpolation)
    lap('resize')
    if rng.random() < flip.probability:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for number in rng.integers(len(self.operations), size=randaugment.num_operations):
      if rng.random() < randaugment.probability:
        image = self.operations[number](image, randaugment.draw(rng))
    lap('flip, RandAugment')
    array = np.asarray(image)
    lap('batch')
    return array


def plain_resize(image: Image.Image, size: int, interpolation: str) -> Image.Image:
  return image.resize((size, size), transforms.INTERPOLATIONS[interpolation])


def in_one_process(pipeline: Pipeline, clock: Clock) -> Iterator[np.ndarray]:
  """Batches of images, made by a plain loop."""
  for step in itertools.count():
    clock.start()
    positions = range(step * pipeline.batch_size, (step + 1) * pipeline.batch_size)
    batch = np.stack([pipeline.example(position, clock.lap) for position in positions])
    clock.lap('batch')
    yield batch


def tf_data_crops(plain: PlainPipeline) -> Iterator[np.ndarray]:
  """The same crops by tf.data on one thread, without RandAugment."""
  import tensorflow as tf

  def boxes() -> Iterator[tuple[str, list[int], bool]]:
    for position in itertools.count():
      index, rng = plain.draw(position)
      with Image.open(plain.paths[index]) as image:
        left, top, right, bottom = plain.transform.crop.draw_box(image.width, image.height, rng)
      yield str(plain.paths[index]), [top, left, bottom - top, right - left], bool(rng.integers(2))

  def load(path: Any, box: Any, bicubic: Any) -> Any:
    image = tf.image.decode_and_crop_jpeg(tf.io.read_file(path), box, channels=3)
    size = [plain.transform.crop.size] * 2
    resized = tf.cond(
      bicubic,
      lambda: tf.image.resize(image, size, 'bicubic', antialias=True),
      lambda: tf.image.resize(image, size, 'bilinear', antialias=True),
    )
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)

  known = list(itertools.islice(boxes(), len(plain.source) * 4))  # drawn before the clock starts
  dataset = tf.data.Dataset.from_tensor_slices(tuple(map(list, zip(*known, strict=True))))
  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  options.threading.max_intra_op_parallelism = 1
  # Or it would work on in the background while others are measured.
  options.experimental_optimization.apply_default_optimizations = False
  dataset = dataset.repeat().map(load).batch(plain.batch_size).with_options(options)
  return dataset.as_numpy_iterator()


class Results(NamedTuple):
  """One entry for each round."""

  rates: list[dict[str, tuple[float, float]]]  # pipeline -> images per second, and per second of a processor
  stages: list[dict[str, dict[str, float]]]  # pipeline -> stage -> milliseconds an image


class Rivals(NamedTuple):
  """The pipelines that are compared."""

  plain: PlainPipeline
  exact: Pipeline
  fast: Pipeline


def cpu_seconds() -> float:
  """Seconds of processor time of this process and the children it has."""
  seconds = time.process_time()
  for children in Path('/proc/self/task').glob('*/children'):
    for child in children.read_text().split():
      fields = Path(f'/proc/{child}/stat').read_text().rpartition(')')[2].split()
      seconds += (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')  # in user and in kernel mode
  return seconds


class Meter:
  """Counts batches, and the time and the processors' time that they take."""

  def __init__(self) -> None:
    self._batches, self._seconds, self._cpu_seconds = 0, 0.0, 0.0

  def take(self, batches: Iterator[Any], number: int) -> None:
    started, cpu_started = time.perf_counter(), cpu_seconds()
    for _ in range(number):
      next(batches)
    self._seconds += time.perf_counter() - started
    self._cpu_seconds += cpu_seconds() - cpu_started
    self._batches += number

  def rates(self, batch_size: int) -> tuple[float, float]:
    """Images per second, and per second of a processor."""
    images = self._batches * batch_size
    return images / self._seconds, images / self._cpu_seconds


def measure(rivals: Rivals, rounds: int, num_batches: int) -> Results:
  """Measures everything once in each round."""
  results = Results([], [])
  clocks = [Clock() for _ in rivals]
  loops = [in_one_process(pipeline, clock) for pipeline, clock in zip(rivals, clocks, strict=True)]
  tf_batches = tf_data_crops(rivals.plain) if importlib.util.find_spec('tensorflow') else None
  for number in range(rounds):
    print(f'round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}', file=sys.stderr)
    meters: dict[str, Meter] = collections.defaultdict(Meter)
    for clock in clocks:
      clock.seconds.clear()
    for _ in range(num_batches):  # batch by batch, so that other work on the machine meets all of them
      for name, loop in zip(NAMES, loops, strict=True):
        meters[f'{name}, loop'].take(loop, 1)
      if tf_batches:
        meters[TF_DATA].take(tf_batches, 1)
    for workers, (name, pipeline) in itertools.product((1, 2), zip(NAMES[1:], rivals[1:], strict=True)):
      with contextlib.closing(pipeline.batches(workers)) as batches:
        for _ in range(BUFFERED_BATCHES):
          next(batches)
        meters[f'{name}, {workers} worker(s)'].take(batches, num_batches * workers)
    batch_size = rivals.plain.batch_size
    results.rates.append({name: meter.rates(batch_size) for name, meter in meters.items()})
    milliseconds = 1e3 / (num_batches * batch_size)
    results.stages.append(
      {
        name: {stage: milliseconds * seconds for stage, seconds in clock.seconds.items()}
        for name, clock in zip(NAMES, clocks, strict=True)
      }
    )
  return results


def check_pixels(rivals: Rivals, num_batches: int) -> None:
  """Fails unless the loader's images, with a worker process, are those of the plain loop."""
  with contextlib.closing(rivals.exact.batches(1)) as batches:
    loops = (in_one_process(pipeline, Clock()) for pipeline in rivals[:2])
    for batch, *others in itertools.islice(zip(batches, *loops, strict=True), num_batches):
      for other in others:
        np.testing.assert_array_equal(batch['image'], other)


def difference(rivals: Rivals, num_crops: int) -> dict[str, float]:
  """Differences of the crops of `fast_decode` from Pillow's, of 255."""
  means, maxima = [], []
  for position in range(num_crops):
    crops = []
    for rival in rivals[1:]:
      index, rng = rival.draw(position)
      file = transforms.EncodedImage(rival.source[index].image)
      crops.append(np.asarray(rival.transform.crop(file, rng), int))
    distance = np.abs(crops[0] - crops[1])
    means.append(distance.mean())
    maxima.append(int(distance.max()))
  return {'crops': num_crops, 'mean': round(float(np.mean(means)), 4), 'max': max(maxima)}


def print_tables(results: Results) -> None:
  rounds, stages = results
  print('\nWhole pipeline: median of the rounds (minimum to maximum)\n')
  print('| pipeline | images/s | times plain | images per second of a core | times plain |\n|---|---|---|---|---|')
  for name in rounds[0]:
    cells = []
    for kind in (0, 1):
      cells.append(common.spread((rates[name][kind] for rates in rounds), 0))
      cells.append(common.spread(rates[name][kind] / rates[PLAIN_LOOP][kind] for rates in rounds))
    if name != TF_DATA:
      print(f'| {name} | {" | ".join(cells)} |')
  for name in NAMES[1:]:
    gains = (rates[f'{name}, 2 worker(s)'][0] / rates[f'{name}, 1 worker(s)'][0] for rates in rounds)
    print(f'\n2 workers against 1, {name}: {common.spread(gains)}')
  print('\nStages in one process, milliseconds an image\n')
  print(f'| stage | {" | ".join(NAMES)} |\n|---|{"---|" * len(NAMES)}')
  for stage in stages[0][NAMES[0]]:
    print(f'| {stage} | {" | ".join(common.spread((x[name][stage] for x in stages), 3) for name in NAMES)} |')
  if TF_DATA in rounds[0]:
    print(f'\n{TF_DATA}: {common.spread((rates[TF_DATA][0] for rates in rounds), 0)} images/s')
    for name in NAMES:
      own = [1e3 / sum(x[name][stage] for stage in CROP_STAGES) for x in stages]
      times = (rate / rates[TF_DATA][0] for rate, rates in zip(own, rounds, strict=True))
      print(f'{name}, {", ".join(CROP_STAGES)}: {common.spread(own, 0)} images/s, {common.spread(times)} times tf.data')


def run(arguments: argparse.Namespace) -> None:
  """Measures, prints the tables, and writes the file.

  Raises:
    UserError: the images can't be read, or no file can be written.
  """
  common.check_output(arguments.output)
  with tempfile.TemporaryDirectory() as folder:
    if not arguments.path:
      write_images(Path(folder), arguments.images)
    source = open_folder(arguments.path or folder, 'train')
    sizes = [len(source[i].image) for i in range(min(len(source), 1000))]
    facts: dict[str, Any] = common.environment(PACKAGES)
    print(json.dumps(facts))
    print(f'{len(source)} JPEG files, {statistics.mean(sizes) / 1e3:.0f} KB on average')
    rivals = Rivals(
      PlainPipeline(source, arguments.batch_size),
      Pipeline(source, arguments.batch_size),
      Pipeline(source, arguments.batch_size, fast=True),
    )
    check_pixels(rivals, num_batches=4)
    fast_difference = difference(rivals, num_crops=1000)
    print(
      f'the pixels of exact equal those of plain Pillow; fast_decode differs, of 255: {json.dumps(fast_difference)}'
    )
    results = measure(rivals, arguments.rounds, arguments.batches)
  print_tables(results)
  facts |= {'mean_bytes': statistics.mean(sizes), 'fast_difference': fast_difference, **results._asdict()}
  common.write_json(arguments.output, facts)


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--path', help='image folder with a split "train" to read instead of images made for the purpose')
  parser.add_argument('--images', type=int, default=300, help='number of images to make (default %(default)s)')
  parser.add_argument('--rounds', type=int, default=7, help='default %(default)s')
  parser.add_argument('--batches', type=int, default=8, help='that each takes in a round (default %(default)s)')
  parser.add_argument('--batch-size', type=int, default=64, help='default %(default)s')
  common.add_output(parser)
  arguments = parser.parse_args()
  with common.one_line_errors():
    run(arguments)


if __name__ == '__main__':
  main()
