"""What a run needs on a TPU slice, before one is rented: python -m t2t_vit_jax.plan --config=FILE --topology=v5e:16x16.

The real training and evaluation step are compiled by the real TPU compiler, on any Linux machine, without a TPU and
without data: pip install 'jax[tpu]'. docs/plan.md says how to read the result.
"""

from collections.abc import Callable, Sequence
import copy
import dataclasses
import importlib.metadata
import itertools
import json
import math
from pathlib import Path
import re
import sys
import time
from typing import Any

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from t2t_vit_jax import tpu
from t2t_vit_jax.command_line import config_file, fail, refusing_bad_flags
from t2t_vit_jax.data.prepare import IMAGENET_COUNTS
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.schedule import Collective, read_schedule
from t2t_vit_jax.training import inputs, sharding
from t2t_vit_jax.training.programs import Programs, abstract_batch, build_programs

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled program: what one run of it takes on each chip. Sizes are in bytes.

  Attributes:
    compile_s: seconds that the compiler took here.
    arguments: the state, or the weights, and a batch.
    outputs: new buffers for results; an argument that a result replaces is not counted again.
    temporaries: everything in between.
    program: the instructions themselves.
    flops: floating-point operations.
    hbm_bytes: see `Schedule`.
    cycles: see `Schedule`.
    collectives: see `Schedule`.
    open_loops: see `Schedule`.
  """

  compile_s: float
  arguments: int
  outputs: int
  temporaries: int
  program: int
  flops: float
  hbm_bytes: int
  cycles: int
  collectives: tuple[Collective, ...]
  open_loops: int

  @property
  def memory(self) -> int:
    return self.arguments + self.outputs + self.temporaries + self.program

  def roofline_s(self, chip: tpu.Chip) -> float:
    """Seconds at the published peaks: no run of this program is faster."""
    return max(self.flops / chip.flops, self.hbm_bytes / chip.bandwidth)

  def estimate_s(self, chip: tpu.Chip) -> float:
    """Seconds by the compiler's cost model, which is no measurement."""
    return self.cycles / chip.clock


class DoesNotFit(Exception):  # noqa: N818 (an answer, not an error)
  """The compiler found no way to run a program in the memory of a chip; it says what it would take."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run on a slice. A step is a text where the compiler says that it does not fit."""

  slice: tpu.Slice
  programs: Programs
  hosts: int
  train: Step | str
  evaluation: Step | str

  @property
  def images_per_chip(self) -> int:
    return self.programs.order.batch_size // self.programs.mesh.size

  def rate(self, seconds: float) -> dict[str, float]:
    """What a training step of so many seconds means for the run."""
    return {
      'ms': 1e3 * seconds,
      'images_per_s': self.programs.order.batch_size / seconds,
      'days': self.programs.total_steps * seconds / 86400,
    }

  def mixing_note(self) -> list[str]:
    """A line where images are mixed with some on other chips."""
    group_size = self.programs.augmentation.mixing.group_size
    if self.images_per_chip % group_size == 0:
      return []
    return [f'mixing groups of {group_size} images span chips, which exchange pixels; results do not change']


def make_plan(config: Any, where: tpu.Slice, num_classes: int, num_train_images: int) -> Plan:
  """Compiles the steps of a run for a slice.

  Raises:
    UserError: the config is wrong or does not fit the slice's devices, or libtpu does not know the slice.
  """
  programs, hosts = _programs(config, where, num_classes, num_train_images)
  return Plan(where, programs, hosts, _answer(compile_train_step, programs), _answer(compile_eval_step, programs))


def _programs(config: Any, where: tpu.Slice, num_classes: int, num_train_images: int) -> tuple[Programs, int]:
  config = copy.deepcopy(config)
  if where.fsdp is not None:
    config.mesh.data, config.mesh.fsdp = -1, where.fsdp
  devices = where.devices()
  mesh = sharding.make_mesh(config.mesh, devices)
  programs = build_programs(config, mesh, num_classes=num_classes, num_train_images=num_train_images)
  return programs, len({device.process_index for device in mesh.devices.flat})


def _answer(compile_step: Callable[[Programs], Step], programs: Programs) -> Step | str:
  try:
    return compile_step(programs)
  except DoesNotFit as answer:
    return str(answer)


def compile_train_step(programs: Programs) -> Step:
  """Raises DoesNotFit."""
  rng = jax.eval_shape(lambda: jax.random.key(0))
  rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=sharding.replicated(programs.mesh))
  arguments = programs.abstract_state, abstract_batch(programs.config, programs.mesh), rng
  return _compile(programs.train_step, arguments, programs.config.optimizer.accumulate_steps)


def compile_eval_step(programs: Programs) -> Step:
  """Raises DoesNotFit."""
  config = copy.deepcopy(programs.config)
  config.data.batch_size = math.ceil(config.data.eval_batch_size / programs.mesh.size) * programs.mesh.size
  return _compile(
    programs.eval_step, (programs.abstract_state.variables(), abstract_batch(config, programs.mesh)), times=1
  )


def _compile(function: jax.stages.Wrapped, arguments: Sequence[Any], times: int) -> Step:
  """Compiles a function whose loop over parts of a batch, if it has one, runs so many times."""
  lowered = function.lower(*arguments)
  start = time.perf_counter()
  try:
    compiled: Any = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise DoesNotFit(_shortage(str(error))) from error
  compile_s = time.perf_counter() - start
  memory = compiled.memory_analysis()
  schedule = read_schedule(compiled.as_text())
  return Step(
    compile_s=compile_s,
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    program=memory.generated_code_size_in_bytes,
    # XLA counts a loop once. What comes after it, the optimizer, is a thousandth of the work.
    flops=compiled.cost_analysis()['flops'] * times,
    **vars(schedule),
  )


def _shortage(message: str) -> str:
  """What the compiler says about memory in a sentence or two, without the list of buffers that follows."""
  first = ' '.join(message.split('RESOURCE_EXHAUSTED:')[1].strip().split('\n\n')[0].split())
  return re.split(r'(?<=[.)]) (?=Total|Program|Largest)', first)[0][:300]


def data_size(config: Any, num_classes: int | None, num_train_images: int | None) -> tuple[int, int]:
  """Classes and training images of a run: as given, else those of the prepared data, else those of ImageNet-1k.

  Raises:
    UserError: nobody knows.
  """
  if num_classes and num_train_images:
    return num_classes, num_train_images
  try:
    train, _ = inputs.open_sources(config.data)
    found = len(train.class_names), len(train)
  except UserError as error:
    if (config.data.source, config.data.name, config.data.train_split) != ('tfds', 'imagenet2012', 'train'):
      raise UserError(f'{error}; or plan without data: --num_classes=N --train_images=N') from error
    found = 1000, IMAGENET_COUNTS['train']
  return num_classes or found[0], num_train_images or found[1]


def search_batch(fits: Callable[[int], bool], unit: int, start: int) -> int:
  """The largest number of images of a chip that fits, to an eighth; 0 if no allowed one does.

  It doubles while that fits (or halves until it does), then halves the gap three times.

  Args:
    fits: compiles for so many images of each chip.
    unit: only multiples of it are allowed.
    start: the first number to try, rounded up to an allowed one.
  """
  good, bad = 0, 0
  size = math.ceil(start / unit) * unit
  while size and not (good and bad):
    if fits(size):
      good, size = size, 2 * size
    else:
      bad, size = size, size // 2 // unit * unit
  for _ in range(3):
    middle = (good + bad) // 2 // unit * unit
    if good < middle < bad:
      good, bad = (middle, bad) if fits(middle) else (good, middle)
  return good


def batch_unit(group_size: int, num_chips: int, accumulate_steps: int) -> int:
  """Images of a chip must be a multiple of this: batches are whole mixing groups, and so are a chip's parts of one."""
  if accumulate_steps > 1:
    return accumulate_steps * group_size
  return math.lcm(group_size, num_chips) // num_chips


def largest_batch(plan: Plan, num_classes: int, num_train_images: int, say: Callable[[str], None]) -> int:
  """The largest `data.batch_size` whose training step fits the plan's slice, found with `search_batch`."""
  chips = plan.programs.mesh.size

  def fits(images: int) -> bool:
    config = copy.deepcopy(plan.programs.config)
    config.data.batch_size = images * chips
    programs, _ = _programs(config, plan.slice, num_classes, num_train_images)
    answer = _answer(compile_train_step, programs)
    found = answer if isinstance(answer, str) else f'fits, {answer.memory / GIB:.2f} GiB'
    say(f'  {images} images on each chip: {found}')
    return not isinstance(answer, str)

  config = plan.programs.config
  group_size = config.augment.mixing_group_size if config.augment.mixup_alpha or config.augment.cutmix_alpha else 1
  unit = batch_unit(group_size, chips, config.optimizer.accumulate_steps)
  return chips * search_batch(fits, unit, plan.images_per_chip)


def describe(plan: Plan) -> list[str]:
  """The plan for people."""
  programs, chip = plan.programs, plan.slice.chip
  config, mesh = programs.config, programs.mesh
  parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(programs.abstract_state.params))
  seconds = ' and '.join(f'{s.compile_s:.0f} s' for s in (plan.train, plan.evaluation) if isinstance(s, Step))
  return [
    f'{config.model.name}, {parameters:,} trained parameters, {config.model.dtype}, {config.data.image_size} px',
    f'{plan.slice.topology}: {mesh.size} chips of {plan.hosts} host(s), mesh data {mesh.shape["data"]} x '
    f'fsdp {mesh.shape["fsdp"]}; a chip holds {sharding.bytes_per_device(programs.abstract_state) / GIB:.3f} GiB of '
    'state',
    f'batch: {programs.order.batch_size} images, {plan.images_per_chip} on each chip; {programs.total_steps:,} steps',
    *plan.mixing_note(),
    f'compiled by {compiler()}' + (f' in {seconds}' if seconds else ''),
    *_describe_step('training step', plan.train, chip, plan.rate),
    *_describe_step('evaluation step', plan.evaluation, chip, None),
  ]


def _describe_step(
  name: str, step: Step | str, chip: tpu.Chip, rate: Callable[[float], dict[str, float]] | None
) -> list[str]:
  if isinstance(step, str):
    return [f'{name}: DOES NOT FIT. {step}']

  def at(seconds: float) -> str:
    text = f'{1e3 * seconds:.3g} ms'
    return text + (', {images_per_s:,.0f} images/s, {days:.3g} days'.format(**rate(seconds)) if rate else '')

  open_loops = f'; {step.open_loops} loops of unknown length are counted once' if step.open_loops else ''
  return [
    f'{name}, on each chip:',
    f'  memory: {step.memory / GIB:.2f} of {chip.hbm_gib:g} GiB, fits (arguments {step.arguments / GIB:.2f}, '
    f'temporaries {step.temporaries / GIB:.2f}, new results {step.outputs / GIB:.2f}, '
    f'program {step.program / GIB:.2f})',
    f'  work: {step.flops / 1e9:,.1f} GFLOP, {step.hbm_bytes / 1e9:,.2f} GB to and from HBM',
    f'  collectives: {collectives(step)}',
    f"  roofline bound, at {chip.name}'s published {chip.flops / 1e12:g} TFLOP/s and {chip.bandwidth / 1e9:g} GB/s: "
    f'{at(step.roofline_s(chip))}',
    f'  estimate of the compiler, not a measurement, {step.cycles:,} cycles at {chip.clock / 1e9:.2f} GHz: '
    f'{at(step.estimate_s(chip))}{open_loops}',
  ]


def collectives(step: Step) -> str:
  """The transfers of a step, those of a kind together, with the bytes of their results on a chip."""

  def kind(transfer: Collective) -> tuple[bool, str]:
    return transfer.in_open_loop, transfer.kind

  texts = []
  for (is_open, name), group in itertools.groupby(sorted(step.collectives, key=kind), key=kind):
    same = list(group)
    count, size = sum(x.count for x in same), sum(x.count * x.num_bytes for x in same)
    dtypes = '+'.join(sorted({dtype for x in same for dtype in x.dtype.split('+')}))
    texts.append(f'{count} {name} of {_size(size)} {dtypes}' + (' in loops of unknown length' if is_open else ''))
  return ', '.join(texts) or 'none'


def _size(num_bytes: int) -> str:
  return f'{num_bytes / 1e6:.1f} MB' if num_bytes >= 1e5 else f'{num_bytes} B'


def compiler() -> str:
  """What the figures depend on."""
  return f'libtpu {importlib.metadata.version("libtpu")}, jax {jax.__version__}'


def as_dict(plan: Plan) -> dict[str, Any]:
  """The plan as JSON."""
  programs, chip = plan.programs, plan.slice.chip

  def step_as_dict(step: Step | str) -> dict[str, Any]:
    if isinstance(step, str):
      return {'fits': False, 'compiler_says': step}
    times = {'roofline_ms': 1e3 * step.roofline_s(chip), 'compiler_estimate_ms': 1e3 * step.estimate_s(chip)}
    return {'fits': True, 'memory': step.memory} | dataclasses.asdict(step) | times

  train = step_as_dict(plan.train)
  if isinstance(plan.train, Step):
    train['roofline'] = plan.rate(plan.train.roofline_s(chip))
    train['compiler_estimate'] = plan.rate(plan.train.estimate_s(chip))
  return {
    'compiler': compiler(),
    'slice': plan.slice.text,
    'chips': programs.mesh.size,
    'hosts': plan.hosts,
    'mesh': dict(programs.mesh.shape),
    'chip': dataclasses.asdict(chip) | {'clock': chip.clock},
    'config': programs.config.to_dict(),
    'images_per_chip': plan.images_per_chip,
    'total_steps': programs.total_steps,
    'notes': plan.mixing_note(),
    'train_step': train,
    'eval_step': step_as_dict(plan.evaluation),
  }


COLUMNS = (
  'model', 'px', 'slice', 'batch (a chip)', 'HBM, GiB', 'GFLOP', 'HBM traffic, GB', 'collectives',
  'roofline bound: ms, days', "compiler's estimate: ms, images/s, days", 'compiled in',
)  # fmt: skip


def row(plan: Plan) -> list[str]:
  """The plan's training step as a row of a table with `COLUMNS`."""
  config, step, chip = plan.programs.config, plan.train, plan.slice.chip
  first = [
    config.model.name,
    str(config.data.image_size),
    plan.slice.text,
    f'{plan.programs.order.batch_size} ({plan.images_per_chip})',
  ]
  if isinstance(step, str):
    return [*first, f'does not fit: {step}', *[''] * (len(COLUMNS) - len(first) - 1)]
  bound, estimate = plan.rate(step.roofline_s(chip)), plan.rate(step.estimate_s(chip))
  return [
    *first,
    f'{step.memory / GIB:.2f} of {chip.hbm_gib:g}',
    f'{step.flops / 1e9:,.0f}',
    f'{step.hbm_bytes / 1e9:.2f}',
    collectives(step),
    '{ms:.3g}, {days:.2g}'.format(**bound),
    '{ms:.3g}, {images_per_s:,.0f}, {days:.2g}'.format(**estimate),
    f'{step.compile_s:.0f} s',
  ]


def table(plans: Sequence[Plan], markdown: bool) -> list[str]:
  """Plans as rows of one table."""
  rows = [list(COLUMNS), *map(row, plans)]
  if markdown:
    rows.insert(1, ['---'] * len(COLUMNS))
    return [f'| {" | ".join(cells)} |' for cells in rows]
  widths = [max(len(cells[i]) for cells in rows if len(cells[i]) < 100) for i in range(len(COLUMNS))]
  return ['  '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows]


def parse_flags(argv: list[str]) -> list[str]:
  """Defines and parses the flags."""
  if file := config_file(argv):
    sys.path.append(str(Path(file).resolve().parents[1]))  # so that a config finds its neighbours from any folder
  with refusing_bad_flags(argv):
    config_flags.DEFINE_config_file('config', None, 'The run: a file in configs/.')
    flags.DEFINE_string('topology', None, f"The slice, and another mesh than the config's: {tpu.EXAMPLES}/fsdp=8.")
    flags.DEFINE_list('compare', None, 'Several of them, for a table: v5e:2x2,v5e:16x16,v5e:16x16/fsdp=8.')
    flags.DEFINE_bool('markdown', False, 'With --compare: a table for Markdown.')
    flags.DEFINE_bool('search_batch', False, 'Find the largest data.batch_size that fits; compiles five to ten times.')
    flags.DEFINE_string('output', None, 'A JSON file to write.')
    flags.DEFINE_integer('num_classes', None, 'Of the data, where it is not prepared here.', lower_bound=1)
    flags.DEFINE_integer('train_images', None, 'Of the data, where it is not prepared here.', lower_bound=1)
    arguments = flags.FLAGS(argv)
  return arguments


def main(argv: list[str]) -> None:
  """Command line."""
  if len(argv) > 1:
    fail(f'arguments without a flag: {" ".join(argv[1:])}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # tfds logs each folder at INFO
  tpu.without_tpu()
  jax.config.update('jax_enable_compilation_cache', False)  # programs are never run, and times are to be seen
  try:
    run(flags.FLAGS.config, flags.FLAGS)
  except UserError as error:
    fail(str(error))


def run(config: Any, options: Any) -> None:
  """Makes and shows what the flags ask for.

  Raises:
    UserError: something is wrong with them.
  """
  if bool(options.topology) == bool(options.compare):
    raise UserError(f'give either --topology or --compare, such as --topology=v5e:2x2 ({tpu.EXAMPLES})')
  if options.output and not Path(options.output).absolute().parent.is_dir():
    raise UserError(f'--output: there is no folder {Path(options.output).absolute().parent}')
  slices = [tpu.Slice.parse(text) for text in options.compare or [options.topology]]
  size = data_size(config, options.num_classes, options.train_images)
  plans, results = [], []
  for where in slices:
    plans.append(plan := make_plan(config, where, *size))
    results.append(as_dict(plan))
    if options.topology:
      print('\n'.join(describe(plan)), flush=True)
    if options.search_batch:
      print(f'largest batch on {where.text}:', flush=True)
      largest = largest_batch(plan, *size, say=lambda line: print(line, flush=True))
      print(f'  data.batch_size={largest} fits, {largest // plan.programs.mesh.size} images on each chip')
      results[-1]['largest_batch_size'] = largest
  if options.compare:
    print('\n'.join(table(plans, options.markdown)))
    print(f'\nBy {compiler()}.')
  if options.output:
    Path(options.output).write_text(json.dumps(results if options.compare else results[0], indent=2) + '\n')


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
