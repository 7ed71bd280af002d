"""Plans a run on TPUs or GPUs before they are rented: t2t-vit plan --config=CONFIG --topology=v5e:16x16.

The real training and evaluation step are compiled by the real compiler, on any Linux machine, without a TPU or GPU and
without data: pip install 't2t-vit-jax[tpu]' or 't2t-vit-jax[gpu-plan]'. docs/distributed.md says how to read the
result.
"""

from collections.abc import Callable, Sequence
import copy
import dataclasses
import json
import math
from pathlib import Path
import sys
from typing import Any

import jax

from t2t_vit_jax.command_line import positive, run_tool
from t2t_vit_jax.config_files import ConfigParser
from t2t_vit_jax.console import say
from t2t_vit_jax.conversion.files import write_file
from t2t_vit_jax.data import pipeline
from t2t_vit_jax.data.sources import IMAGENET_COUNTS
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.planning import report, topology, tpu
from t2t_vit_jax.planning.compilation import DoesNotFit, compile_program, figures
from t2t_vit_jax.planning.flops import count_flops
from t2t_vit_jax.planning.topology import Topology
from t2t_vit_jax.recipe import sharding
from t2t_vit_jax.recipe.build import Recipe, build_mesh, build_recipe
from t2t_vit_jax.recipe.init_from import resolve

IMAGENET_CLASSES = 1000


def make_plan(recipe: Recipe, where: Topology) -> dict[str, Any]:
  """Compiles the steps of a recipe that `build` has made for a slice or for GPUs.

  Returns:
    The plan that `--output` writes. Sizes are in bytes. Sizes, work and collectives are of one chip.
  """
  mesh, chip, order = recipe.mesh, where.chip, recipe.order
  train, evaluation = (_try_step(step, recipe, where) for step in (compile_train_step, compile_eval_step))
  for kind in ('roofline', 'compiler_estimate'):
    if f'{kind}_ms' in train:
      seconds = train[f'{kind}_ms'] / 1e3
      train[kind] = {'images_per_s': order.batch_size / seconds, 'days': recipe.total_steps * seconds / 86400}
  return {
    'compiler': where.compiler(),
    'slice': where.text,
    'chips': mesh.size,
    'hosts': len({device.process_index for device in mesh.devices.flat}),
    'mesh': dict(mesh.shape),
    'chip': dataclasses.asdict(chip)
    | {'hbm_gib': chip.hbm_gib}
    | ({'clock': chip.clock} if isinstance(chip, tpu.Chip) else {}),
    'config': recipe.config,
    'parameters': recipe.num_parameters,
    'state': sharding.bytes_per_device(recipe.abstract_state),
    'images_per_chip': recipe.images_per_device,
    'mixing_group_size': recipe.augmentation.mixing.group_size,
    'total_steps': recipe.total_steps,
    'train_step': train,
    'eval_step': evaluation,
  }


def build(config: Any, where: Topology, num_classes: int, num_train_images: int) -> Recipe:
  """The recipe of a run on described devices, with the mesh that `where` names, if it does.

  Raises:
    UserError: the config is wrong or does not fit the devices, or the compiler does not know them.
  """
  config = copy.deepcopy(config)
  if where.fsdp is not None:
    config.mesh.data, config.mesh.fsdp = -1, where.fsdp
  mesh = build_mesh(config, where.devices())
  return build_recipe(config, mesh, num_classes=num_classes, num_train_images=num_train_images)


def compile_train_step(recipe: Recipe, where: Topology) -> dict[str, Any]:
  """Figures of the compiled training step; raises DoesNotFit."""
  return _compile(recipe, recipe.train_step, recipe.abstract_train_arguments, where, recipe.accumulate_steps)


def compile_eval_step(recipe: Recipe, where: Topology) -> dict[str, Any]:
  """Figures of the compiled evaluation step; raises DoesNotFit."""
  arguments = recipe.abstract_state.variables(), recipe.abstract_batch(recipe.eval_batch_size)
  return _compile(recipe, recipe.eval_step, arguments, where, parts=1)


def _try_step(step: Callable[[Recipe, Topology], dict[str, Any]], recipe: Recipe, where: Topology) -> dict[str, Any]:
  try:
    return {'fits': True} | step(recipe, where)
  except DoesNotFit as refusal:
    return {'fits': False, 'compiler_says': str(refusal)}


def _compile(
  recipe: Recipe, function: jax.stages.Wrapped, arguments: Sequence[Any], where: Topology, parts: int
) -> dict[str, Any]:
  compiled, compile_s = compile_program(function, arguments, where)
  product_flops = count_flops(function, *arguments) / recipe.mesh.size
  return {'compile_s': compile_s} | figures(compiled, where.chip, product_flops, parts)


def data_size(config: Any, num_classes: int | None, num_train_images: int | None) -> tuple[int, int]:
  """Classes and training images of a run: as given, or from the prepared data, or from ImageNet-1k.

  Raises:
    UserError: they are not known.
  """
  if num_classes and num_train_images:
    return num_classes, num_train_images
  try:
    train, _ = pipeline.open_sources(config.data)
    classes, images = len(train.class_names), len(train)
  except UserError as error:
    if (config.data.source, config.data.name, config.data.train_split) != ('tfds', 'imagenet2012', 'train'):
      raise UserError(f'{error}; or plan without data: --num_classes=N --train_images=N') from error
    classes, images = IMAGENET_CLASSES, IMAGENET_COUNTS['train']
  return num_classes or classes, num_train_images or images


def largest_batch(config: Any, where: Topology, data: tuple[int, int], say: Callable[[str], None]) -> int:
  """The largest `data.batch_size` whose training step fits, to an eighth: see `search_batch`. 0 if none does."""
  recipe = build(config, where, *data)
  chips = recipe.mesh.size

  def fits(images: int) -> bool:
    if images * chips > data[1]:
      return False  # a batch has no image twice
    changed = copy.deepcopy(config)
    changed.data.batch_size = images * chips
    step = _try_step(compile_train_step, build(changed, where, *data), where)
    say(f'  {images} images on each chip: {report.memory(step, where.chip.hbm_gib)}')
    return step['fits']

  mixed = config.augment.mixup_alpha or config.augment.cutmix_alpha
  group_size = config.augment.mixing_group_size if mixed else 1
  unit = batch_unit(group_size, chips, config.optimizer.accumulate_steps)
  return chips * search_batch(fits, unit, recipe.order.batch_size // chips)


def search_batch(fits: Callable[[int], bool], unit: int, start: int) -> int:
  """The largest number of images of a chip that fits, to about an eighth; 0 if no allowed one does.

  Doubles the number while it fits, or halves it until it does; then halves the gap three times.

  Args:
    fits: compiles for a number of images of each chip.
    unit: only its multiples are allowed.
    start: the first number to try, rounded up to an allowed one.
  """
  good = bad = 0
  size = math.ceil(start / unit) * unit
  while size and not (good and bad):
    if fits(size):
      good, size = size, 2 * size
    else:
      bad, size = size, size // 2 // unit * unit
  for _ in range(3):
    middle = (good + bad) // 2 // unit * unit
    if good < middle:
      good, bad = (middle, bad) if fits(middle) else (good, middle)
  return good


def batch_unit(group_size: int, num_chips: int, accumulate_steps: int) -> int:
  """The number that must divide a chip's images: batches, and a chip's parts of one, are whole mixing groups."""
  if accumulate_steps > 1:
    return accumulate_steps * group_size
  return math.lcm(group_size, num_chips) // num_chips


def run(arguments: Any) -> int:
  """Does what the command line asks for; returns the exit code."""
  tpu.without_tpu()
  jax.config.update('jax_enable_compilation_cache', False)  # programs are never run, and compile times are shown
  plan(arguments.config, arguments)
  return 0


def plan(config: Any, options: Any) -> None:
  """Makes, shows and writes the plans that the flags ask for.

  Raises:
    UserError: something is wrong with them.
  """
  if bool(options.topology) == bool(options.compare):
    raise UserError(f'give either --topology or --compare, such as --topology=v5e:2x2 ({topology.EXAMPLES})')
  if options.output and not (folder := Path(options.output).absolute().parent).is_dir():
    raise UserError(f'--output: there is no folder {folder}')
  places = [topology.parse(text) for text in options.compare or [options.topology]]
  config = resolve(config)
  host_config = copy.deepcopy(config)
  host_config.data.fast_decode = False  # its packages need not be installed
  pipeline.train_transform(host_config)  # refuses wrong fields
  data = data_size(config, options.num_classes, options.train_images)
  # All recipes first: a wrong topology is refused before anything is compiled.
  recipes = [build(config, where, *data) for where in places]
  plans = []
  for where, recipe in zip(places, recipes, strict=True):
    plans.append(make_plan(recipe, where))
    if options.topology:
      for line in report.describe(plans[-1]):
        say(line)
    else:
      print(f'{where.text}: compiled', file=sys.stderr, flush=True)
    if options.search_batch:
      say(f'largest batch on {where.text}:')
      plans[-1]['largest_batch_size'] = largest_batch(config, where, data, say)
      size = plans[-1]['largest_batch_size']
      say(f'  largest that fits: data.batch_size={size}' if size else '  none fits')
  if options.compare:
    for line in report.table(plans, options.markdown):
      say(line)
  if options.output:
    text = json.dumps(plans if options.compare else plans[0], indent=2) + '\n'
    write_file(Path(options.output), lambda temporary: temporary.write_text(text))


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = ConfigParser(
    'plan',
    example='t2t-vit plan --config=t2t_vit_14 --topology=v5e:16x16',
    description='Tells what a run needs on TPUs or GPUs, by their compilers: no TPU, GPU or data is needed.',
  )
  parser.add_argument(
    '--topology', metavar='SLICE', help=f"TPUs or GPUs, with a mesh in place of the config's: {topology.EXAMPLES}"
  )
  parser.add_argument(
    '--compare',
    metavar='SLICE,...',
    type=lambda text: text.split(','),
    help='several topologies, for a table: v5e:2x2,v5e:16x16/fsdp=8,h100:8',
  )
  parser.add_argument('--markdown', action='store_true', help='write the table of --compare in Markdown')
  parser.add_argument(
    '--search_batch', action='store_true', help='find the largest data.batch_size that fits; compiles about six times'
  )
  parser.add_argument('--output', metavar='FILE', help='JSON file to write: a plan, or with --compare a list of plans')
  parser.add_argument(
    '--num_classes', metavar='N', type=positive, help='number of classes of data that is not prepared here'
  )
  parser.add_argument(
    '--train_images', metavar='N', type=positive, help='number of training images of data that is not prepared here'
  )
  return run_tool(lambda: run(parser.parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main())
