"""A first hour on a device: what is right and how fast it is there, on one page. `python -m benchmarks.device`.

Takes the first device that JAX finds, whatever it is. Writes `device.md`, `device.json` and a profile into --output:

  parity       logits and gradients of six models against those of this machine's CPU in float32, which agree with
               PyTorch's; they are within the bounds, or the page says FAIL
  forms        ways to compute the attention, side by side: values against the first one's, and speed
  throughput   forward pass and training step of the published recipe for growing batches, until memory ends
  input        images/s of the input pipeline of this host against those of the training step
  compilation  seconds of the training step's compilation, with an empty and with a filled cache

A part that fails says so, and the next one follows; the page is written anew after each row. `--small` takes small
models and few batches, for a trial on a CPU.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import itertools
import os
from pathlib import Path
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import numpy as np

from benchmarks import common, computations
from benchmarks.computations import Workload
from benchmarks.input_pipeline import Meter, Pipeline, write_images
from benchmarks.jax_process import JaxComputations
from t2t_vit_jax.data.sources import open_folder
from t2t_vit_jax.data.worker_count import default_num_workers
from t2t_vit_jax.errors import UserError, first_line, plural

MODELS = ('t2t_vit_7', 't2t_vit_14', 't2t_vit_t_14', 't2t_vit_14_se', 't2t_vit_16_ghost', 't2t_vit_dense')
# Largest difference of logits, in their deviations, and relative length of the difference of gradients.
BOUNDS = {'float32': (1e-4, 1e-3), 'bfloat16': (0.1, 0.1)}
FORMS = {
  't2t_vit_14': ({'attention_form': 'xla'}, {'attention_form': 'cudnn'}),
  't2t_vit_t_14': tuple({'token_attention_form': form} for form in ('full', 'chunked', 'cudnn')),
}
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Scale:
  """How much is measured: batches of throughput and forms, images of the input, and fields and side of the models.

  `seconds` are those of a round of a measurement.
  """

  batches: Sequence[int] = (1, 32, 64, 128, 256, 512, 1024, 2048)
  forms_batch: int = 64
  images: int = 512
  side: int = 224
  seconds: float = 1.0
  fields: tuple[tuple[str, Any], ...] = ()

  def workload(self, model: str, batch_size: int, dtype: str = 'bfloat16', **fields: Any) -> Workload:
    """A model of this scale."""
    own = dict(self.fields)
    if model == 't2t_vit_dense' and own:
      own = {'dense_stages': (1, 1)}  # it has no depth
    return Workload(model, batch_size, self.side, dtype, own | fields)


SMALL = Scale(batches=(4,), forms_batch=2, images=32, side=64, seconds=0.1, fields=(('depth', 1),))


def parity(scale: Scale) -> Iterator[list[str]]:
  """Rows: model, dtype, difference of logits and of gradients, verdict."""
  device, host = jax.devices()[0], jax.local_devices(backend='cpu')[0]
  for name in MODELS:
    workload = scale.workload(name, 2, 'float32')
    model = computations.build_model(workload)
    with jax.default_device(host):
      images = images_for(workload)
      variables = widened(jax.jit(model.init)(jax.random.key(0), images))
      expected = outcome(model, variables, images)
    for dtype, (logits_bound, gradients_bound) in BOUNDS.items():
      placed = jax.device_put((variables, images), device)
      logits, gradients = outcome(model.clone(dtype=jnp.dtype(dtype)), *placed)
      by_logits = np.abs(logits - expected[0]).max() / expected[0].std()
      by_gradients = relative_difference(gradients, expected[1])
      right = by_logits <= logits_bound and by_gradients <= gradients_bound
      yield [name, dtype, f'{by_logits:.1e}', f'{by_gradients:.1e}', 'within bounds' if right else 'FAIL']


def images_for(workload: Workload) -> jax.Array:
  """Noise, and a colour for each 16 x 16 px."""
  rng = np.random.default_rng(0)
  count, side = workload.batch_size, workload.image_size
  patches = rng.normal(size=(count, side // 16, side // 16, 3)).repeat(16, axis=1).repeat(16, axis=2)
  return jnp.asarray(patches + rng.normal(size=(count, side, side, 3)) / 2, jnp.float32)


def widened(variables: Any) -> Any:
  """Fresh variables with larger weights, so that attention and logits depend on the image as those of trained ones."""

  def widen(path: Any, x: jax.Array) -> jax.Array:
    return 2 * x if path[-1].key == 'kernel' else x

  return {**variables, 'params': jax.tree_util.tree_map_with_path(widen, variables['params'])}


def outcome(model: Any, variables: Any, images: Any) -> tuple[np.ndarray, Any]:
  """Logits, and gradients of the mean of their squares with respect to the parameters."""

  def loss(params: Any) -> Any:
    logits = model.apply({**variables, 'params': params}, images)
    return (logits**2).mean(), logits

  gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(variables['params'])
  return np.asarray(logits), jax.device_get(gradients)


def relative_difference(actual: Any, expected: Any) -> float:
  """Length of the difference of two gradients, each one vector, relative to the expected one's."""
  pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
  difference = sum(float(np.sum((x - y) ** 2, dtype=np.float64)) for x, y in pairs)
  return float(np.sqrt(difference / sum(float(np.sum(y**2, dtype=np.float64)) for _, y in pairs)))


def forms(scale: Scale) -> Iterator[list[str]]:
  """Rows: model, form, differences from the first form, and milliseconds of both computations."""
  cpu = JaxComputations()
  for name, choices in FORMS.items():
    first: Any = None
    for fields in choices:
      if 'cudnn' in fields.values() and jax.default_backend() != 'gpu':
        continue
      workload = scale.workload(name, scale.forms_batch, **fields)
      model = computations.build_model(workload)
      images = images_for(workload)
      found = outcome(model, widened(jax.jit(model.init)(jax.random.key(0), images[:1])), images)
      first = first or found
      by_logits, by_gradients = (
        np.abs(found[0] - first[0]).max() / first[0].std(),
        relative_difference(found[1], first[1]),
      )
      times = [
        milliseconds(cpu, f'{name} {fields}', computation, workload, scale.seconds)[0]
        for computation in ('forward', 'adamw_step')
      ]
      form = ', '.join(fields.values())
      yield [name, form, f'{by_logits:.1e}', f'{by_gradients:.1e}', *(common.spread(x, 2) for x in times)]


def milliseconds(
  device: JaxComputations, key: str, computation: str, workload: Workload, seconds: float
) -> tuple[list[float], dict[str, Any]]:
  """Milliseconds of a call in each round of about `seconds`, and what preparing it has told."""
  key = f'{key}, {computation}'
  facts = device.prepare(key, computation, workload=workload)
  calls = max(1, round(seconds / facts['warm_s']))
  return [1e3 * device.seconds(key, calls) for _ in range(ROUNDS)], facts


def throughput(scale: Scale, best: dict[str, float]) -> Iterator[list[str]]:
  """Rows: computation, batch, milliseconds, images/s, share of the peak, memory; notes the best images/s in `best`."""
  for computation, batch_size in itertools.product(('forward', 'training_step'), scale.batches):
    device = JaxComputations()  # a fresh one: arrays of the last go
    workload = scale.workload('t2t_vit_14', batch_size)
    try:
      times, facts = milliseconds(device, '', computation, workload, scale.seconds)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      yield [computation, f'{batch_size}', 'does not fit', '', '', '']
      continue
    rate = 1e3 * batch_size / statistics.median(times)
    best[computation] = max(best.get(computation, 0), rate)
    peak = device.device()['peak_flops']
    share = f'{facts["product_flops"] / batch_size * rate / peak:.1%}' if peak else 'peak unknown'
    memory = f'{facts["temporaries"] / 1e6:,.0f}' if facts['temporaries'] else ''
    yield [
      computation, f'{batch_size}', common.spread(times, 2), f'{rate:,.0f}', share, memory,
    ]  # fmt: skip


def input_rates(scale: Scale, best: dict[str, float]) -> Iterator[list[str]]:
  """Rows: pipeline, workers, images/s, and the share of the fastest training step's images."""
  number, _ = default_num_workers(1, lambda _: 0)
  with tempfile.TemporaryDirectory() as folder:
    write_images(Path(folder), scale.images)
    source = open_folder(folder, 'train')
    for fast in (False, True):
      pipeline = Pipeline(source, min(64, scale.images), fast=fast)
      with contextlib.closing(pipeline.batches(number)) as batches:
        next(batches)
        meter = Meter()
        meter.take(batches, max(2, 4 * scale.images // pipeline.batch_size))
      rate, _ = meter.rates(pipeline.batch_size)
      share = f'{rate / best["training_step"]:.0%}' if best.get('training_step') else ''
      yield ['fast_decode' if fast else 'exact', f'{number}', f'{rate:,.0f}', share]


def compilation(scale: Scale) -> Iterator[list[str]]:
  """Rows: cache, seconds."""
  recipe = computations.training_recipe(
    scale.workload('t2t_vit_14', scale.batches[-1] if scale is SMALL else 128),
    computations.one_device_mesh(jax.devices()[0]),
  )
  with tempfile.TemporaryDirectory() as folder:
    settings = {
      'jax_enable_compilation_cache': True,
      'jax_compilation_cache_dir': folder,
      'jax_persistent_cache_min_compile_time_secs': 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
      for cache in ('empty', 'filled'):
        jax.clear_caches()
        start = time.perf_counter()
        recipe.train_step.lower(*recipe.abstract_train_arguments).compile()
        yield [cache, f'{time.perf_counter() - start:.1f}']
    finally:
      for name, value in before.items():
        jax.config.update(name, value)
      compilation_cache.reset_cache()


def profile(scale: Scale, folder: Path) -> Iterator[list[str]]:
  """Writes a trace of ten training steps; rows: where it is."""
  device = JaxComputations()
  workload = scale.workload('t2t_vit_14', scale.batches[-1] if scale is SMALL else 128)
  device.prepare('profile', 'training_step', workload=workload)
  with jax.profiler.trace(str(folder)):
    device.seconds('profile', 10)
  size = sum(file.stat().st_size for file in folder.rglob('*') if file.is_file())
  yield [folder.name, f'{size / 1e6:.1f} MB', 'xprof or TensorBoard opens it']


class Page:
  """The page: parts as they come, written anew after each row."""

  def __init__(self, folder: Path, facts: dict[str, Any]):
    self._folder, self._facts = folder, facts
    self._parts: dict[str, Any] = {}
    self._facts['parts'] = self._parts
    self.failed = False

  def part(self, title: str, header: Sequence[str], rows: Iterator[list[str]]) -> None:
    """Computes a part row by row; what goes wrong becomes a line of the page."""
    part: dict[str, Any] = {'header': list(header), 'rows': []}
    self._parts[title] = part
    try:
      for row in rows:
        print(f'{title}: {", ".join(row)}', file=sys.stderr, flush=True)
        part['rows'].append(row)
        self.failed |= 'FAIL' in row
        self._write()
    except Exception as error:  # the page is for those who cannot come back to the device
      self.failed = True
      part['error'] = first_line(error)
      print(f'{title}: {part["error"]}', file=sys.stderr, flush=True)
    self._write()

  def _write(self) -> None:
    common.write_json(str(self._folder / 'device.json'), self._facts)
    (self._folder / 'device.md').write_text(self.text(), encoding='utf-8')

  def text(self) -> str:
    """The page in Markdown."""
    facts = self._facts
    lines = [f'# t2t_vit_jax on {facts["device"]["kind"]}', '']
    lines += [
      f'{plural(facts["devices"], "device")}, {facts["cpu"]}, {facts["cores"]} processors, commit {facts["commit"]}; '
    ]
    lines += [', '.join(f'{name} {version}' for name, version in facts['versions'].items()), '']
    for title, part in self._parts.items():
      lines += [f'## {title}', '']
      if part['rows']:
        lines += [common.table(part['header'], part['rows']), '']
      if 'error' in part:
        lines += [f'FAIL: {part["error"]}', '']
    return '\n'.join(lines)


def parse_arguments() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--output', default='device', help='folder for the page (default: %(default)s)')
  parser.add_argument('--small', action='store_true', help='small models, few batches: a trial')
  return parser.parse_args()


def run(arguments: argparse.Namespace) -> bool:
  """Measures everything; returns whether nothing failed.

  Raises:
    UserError: the folder cannot be written.
  """
  folder = Path(arguments.output)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'--output: {folder} is no folder that can be written ({first_line(error, kind=False)})') from error
  common.check_output(str(folder / 'device.json'))
  scale = SMALL if arguments.small else Scale()
  facts = common.environment() | {'device': JaxComputations().device(), 'devices': jax.device_count()}
  page, best = Page(folder, facts), dict[str, float]()
  by_logits, by_gradients = 'logits differ by (deviations)', 'gradients by (relative)'
  page.part('Parity with float32 on a CPU', ('model', 'dtype', by_logits, by_gradients, ''), parity(scale))
  page.part(
    f'Forms of attention, bfloat16, {scale.forms_batch} images',
    ('model', 'form', by_logits, by_gradients, 'forward, ms', 'AdamW step, ms'),
    forms(scale),
  )
  page.part(
    'Throughput of t2t_vit_14, bfloat16',
    ('computation', 'images', 'ms', 'images/s', 'share of peak', 'temporaries MB'),
    throughput(scale, best),
  )
  page.part('Input', ('pipeline', 'workers', 'images/s', 'of the training step'), input_rates(scale, best))
  page.part('Compilation of the training step', ('cache', 'seconds'), compilation(scale))
  page.part('Profile of ten training steps', ('folder', 'size', ''), profile(scale, folder / 'profile'))
  print(page.text())
  print(f'written: {folder / "device.md"} and {folder / "device.json"}')
  return not page.failed


def main() -> None:
  """Command line."""
  arguments = parse_arguments()
  if platforms := os.environ.get('JAX_PLATFORMS'):
    os.environ['JAX_PLATFORMS'] = ','.join(dict.fromkeys([*platforms.split(','), 'cpu']))  # parity needs it
    jax.config.update('jax_platforms', os.environ['JAX_PLATFORMS'])
  with common.one_line_errors():
    right = run(arguments)
  sys.exit(0 if right else 1)


if __name__ == '__main__':
  main()
