"""Results of the TPU's or GPU's compiler for a model, without either: `python -m benchmarks.compiler`.

pip install -e '.[tpu]', or for a GPU -e '.[gpu-plan]' and --chip h100.

Compiles for one chip the forward pass, the mean cross entropy with its gradients (`value_and_grad`), and the training
step as it really runs, with AdamW, moving average and augmentation; each in several forms, beside a plain ViT-S/16.

  M cycles      the TPU compiler's estimate, summed over the schedule; loops count as often as they run. It is a weak
                model of time: it prices large matrix products near the peak and passes over memory several times too
                high. Differences under 5 % are ties. The GPU's compiler gives none.
  launches      operations that run; on a GPU each starts a kernel.
  GFLOP         arithmetic of matrix products and convolutions, see `planning.flops`; and XLA's count of everything,
                which has the bodies of loops once.
  HBM GB        read from and written to main memory: operands and results of all operations. What stays in a TPU's
                on-chip memory is not counted, what stays in a GPU's L2 cache is.
  bound, ms     the longest of the arithmetic and the traffic at the chip's published peaks. Not a measurement: what a
                GPU's libraries do inside, and how well, is not seen.
  temporaries   memory beside arguments and results.
"""

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import math
import re
import sys
from typing import Any

import jax

from benchmarks import common, computations
from benchmarks.computations import Workload
from t2t_vit_jax.planning import gpu, topology, tpu
from t2t_vit_jax.planning.compilation import DoesNotFit, compile_program, figures
from t2t_vit_jax.planning.flops import count_flops
from t2t_vit_jax.planning.schedule import Operation, read_operations
from t2t_vit_jax.recipe import sharding

# Any that the compiler knows: programs are compiled for one of its chips.
TOPOLOGIES = {'v4': 'v4:2x2x1', 'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2', **{x: x for x in gpu.GPUS}}
COMPUTATIONS = ('forward', 'value_and_grad', 'training_step')
KEPT_OPERATIONS = 30  # of each program, in the file: the costliest in each unit
UNITS = {'cycles': 'M cycles', 'hbm_bytes': 'MB of main memory'}  # fields of `Operation` -> millions of them
# Of loops and recomputation, in the names of operations.
CONTROL = ('while', 'body', 'cond', 'closed_call', 'checkpoint', 'rematted_computation', 'remat')
HEADER = (
  'form', 'computation', 'M cycles', 'launches', 'GFLOP', 'GFLOP (XLA)', 'HBM GB', 'bound, ms', 'temporaries MB',
  'arguments MB', 'compiled in',
)  # fmt: skip


def programs(name: str, workload: Workload, wanted: Sequence[str], device: Any) -> Iterator[tuple[str, Any, Any]]:
  """(computation, jitted function, descriptions of its arguments) for one chip."""
  mesh = computations.one_device_mesh(device)
  where = sharding.replicated(mesh)
  build = computations.build_yardstick if name == computations.YARDSTICK else computations.build_model
  model = build(workload)
  given = computations.variables_of(model, workload, where), computations.images_of(workload, where)
  if 'forward' in wanted:
    yield 'forward', computations.jitted(computations.forward, model, where), given
  if 'value_and_grad' in wanted:
    function = computations.jitted(computations.value_and_grad, model, where)
    yield 'value_and_grad', function, (*given, computations.labels_of(workload, where))
  if 'training_step' in wanted:
    recipe = computations.training_recipe(workload, mesh)
    yield 'training_step', recipe.train_step, recipe.abstract_train_arguments


def measure(function: Any, arguments: Any, where: topology.Topology) -> dict[str, Any]:
  """Compiles a program: all that is known about it."""
  product_flops = count_flops(function, *arguments)
  result: dict[str, Any] = {'product_flops': product_flops}
  try:
    compiled, seconds = compile_program(function, arguments, where)
  except DoesNotFit as answer:
    return result | {'fits': False, 'compiler_says': str(answer)}
  operations = read_operations(compiled.as_text())
  return result | {
    'fits': True,
    'compile_s': seconds,
    **figures(compiled, where.chip, product_flops),
    'profiles': {unit: profile(operations, unit) for unit in UNITS},
    'arrays': traffic_by_array(operations),
    'operations': {
      unit: [dataclasses.asdict(operation) for operation in costliest(operations, unit)[:KEPT_OPERATIONS]]
      for unit in UNITS
    },
  }


def costliest(operations: Sequence[Operation], unit: str) -> list[Operation]:
  """Operations with a cost in a unit of `UNITS`, the costliest first; a GPU's have none in cycles."""
  return sorted((x for x in operations if getattr(x, unit)), key=lambda x: -getattr(x, unit))


def profile(operations: Sequence[Operation], unit: str) -> dict[str, dict[str, int]]:
  """Cost by the place in the model that operations come from, then by pass; the costliest place first."""
  costs: dict[str, dict[str, int]] = {}
  for operation in operations:
    if cost := getattr(operation, unit):
      place, which = place_and_pass(operation.source)
      passes = costs.setdefault(place, {})
      passes[which] = passes.get(which, 0) + cost
  return dict(sorted(costs.items(), key=lambda item: -sum(item[1].values())))


def traffic_by_array(operations: Sequence[Operation]) -> dict[str, int]:
  """Bytes of main memory by what is read and written, the most first.

  Arrays of one dtype and number of values are one entry, under their most frequent shape: they are the same values in
  other layouts. A transfer to or from on-chip memory counts as the part that it moves.
  """
  traffic: dict[tuple[str, int], dict[str, int]] = {}
  for operation in operations:
    for array, num_bytes in operation.arrays.items():
      dtype, dims = array.rstrip(']').split('[')
      shapes = traffic.setdefault((dtype, math.prod(int(size) for size in dims.split(',') if size)), {})
      shapes[array] = shapes.get(array, 0) + num_bytes
  totals = {max(shapes, key=lambda array: shapes[array]): sum(shapes.values()) for shapes in traffic.values()}
  return dict(sorted(totals.items(), key=lambda item: -item[1]))


def place_and_pass(source: str) -> tuple[str, str]:
  """Place of an operation in a model, and its pass: forward, backward or its recomputation.

  A fusion counts where its root belongs. Blocks of a kind are one place: 'blocks/attn'.

  >>> place_and_pass('jit(f)/transpose(jvp(T2TViT))/blocks_3/mlp/fc1/dot_general')
  ('blocks/mlp/fc1', 'backward')
  """
  if not source:
    return '(made by the compiler)', 'forward'
  which = 'forward'
  if 'rematted_computation' in source:
    which = 'recomputed'
  elif 'transpose(' in source:
    which = 'backward'
  # Of jvp(loss) and transpose(jvp(loss)) the scope counts; other brackets are functions. The primitive comes last.
  parts = [re.sub(r'^(?:transpose\()?jvp\((\w+)\)+$', r'\1', part) for part in source.split('/')]
  parts = [part for part in parts if '(' not in part]
  parts = [part for part in parts[:-1] if part not in CONTROL and part.split('.')[0] not in ('T2TViT', 'ViT')]
  places = [re.sub(r'^blocks_\d+$|^EncoderBlock$', 'blocks', part) for part in parts]
  places = [part for i, part in enumerate(places) if not (i and part.startswith(f'{places[i - 1]}.'))]  # a method
  return '/'.join(places) or '(outside of modules)', which


def row(form: str, computation: str, result: dict[str, Any]) -> list[str]:
  """Row of the table."""
  flops = f'{result["product_flops"] / 1e9:,.0f}'
  if not result['fits']:
    return [form, computation, 'does not fit', '', flops, *[''] * (len(HEADER) - 5)]
  return [
    form,
    computation,
    f'{result["cycles"] / 1e6:,.1f}' if result['cycles'] else '',
    f'{result["launches"]:,}' + '*' * bool(result['open_loops']),
    flops,
    f'{result["flops"] / 1e9:,.0f}',
    f'{result["hbm_bytes"] / 1e9:,.2f}',
    f'{result["roofline_ms"]:.1f}',
    f'{result["temporaries"] / 1e6:,.0f}',
    f'{result["arguments"] / 1e6:,.0f}',
    f'{result["compile_s"]:.0f} s',
  ]


def print_profiles(title: str, result: dict[str, Any], num_rows: int) -> None:
  """Prints where a program's cycles and bytes go, and its largest operations in each."""
  for unit, shown in UNITS.items():
    profile = result['profiles'][unit]
    if not profile:
      continue
    passes = [x for x in ('forward', 'backward', 'recomputed') if any(x in costs for costs in profile.values())]
    places = dict(list(profile.items())[:num_rows])
    rest = list(profile.values())[num_rows:]
    if rest:
      places[f'{len(rest)} others'] = {which: sum(costs.get(which, 0) for costs in rest) for which in passes}
    print(f'\n{title}: {shown} by the place of the last operation of a fusion\n')
    print(
      common.table(
        ('place', *passes, 'all', 'share'),
        (
          [
            place,
            *(f'{costs.get(which, 0) / 1e6:,.2f}' for which in passes),
            f'{sum(costs.values()) / 1e6:,.2f}',
            f'{sum(costs.values()) / result[unit]:.1%}',
          ]
          for place, costs in places.items()
        ),
      )
    )
    print(f'\n{title}: the largest operations\n')
    print(
      common.table(
        (shown, 'runs', 'operation', 'result', 'comes from'),
        (
          [
            f'{operation[unit] / 1e6:,.2f}',
            str(operation['count']),
            operation['name'],
            ' '.join(re.findall(r'\w+\[[\d,]*\]', operation['type'])[:3]),
            operation['source'],
          ]
          for operation in result['operations'][unit][:num_rows]
        ),
      )
    )


def print_arrays(title: str, result: dict[str, Any], num_rows: int) -> None:
  """Prints which arrays a program's traffic is."""
  arrays = list(result['arrays'].items())
  rest = sum(num_bytes for _, num_bytes in arrays[num_rows:])
  shown = arrays[:num_rows] + ([(f'{len(arrays) - num_rows} others', rest)] if rest else [])
  print(f'\n{title}: MB of main memory by array, in any layout\n')
  print(
    common.table(
      ('array', 'MB', 'share'),
      ([array, f'{size / 1e6:,.2f}', f'{size / result["hbm_bytes"]:.1%}'] for array, size in shown),
    )
  )


def parse_arguments() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  computations.add_arguments(parser, batch_size=128, dtype='bfloat16')
  parser.add_argument('--chip', choices=TOPOLOGIES, default='v5e', help='default %(default)s')
  parser.add_argument(
    '--computation', action='append', choices=COMPUTATIONS, help='may be given often (default: all of them)'
  )
  parser.add_argument('--no-yardstick', action='store_true', help=f'without {computations.YARDSTICK}')
  parser.add_argument(
    '--profile',
    type=int,
    nargs='?',
    const=20,
    default=0,
    metavar='N',
    help='show where cycles and bytes go: the N costliest places and operations of each program (20)',
  )
  common.add_output(parser)
  return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
  """Compiles everything, prints the table, and writes the file.

  Raises:
    UserError: something about the arguments is wrong, or the compiler is missing.
  """
  common.check_output(arguments.output)
  workloads = computations.workloads(arguments)
  where = topology.parse(TOPOLOGIES[arguments.chip])
  device = where.devices()[0]
  if not arguments.no_yardstick:
    first = next(iter(workloads.values()))
    workloads[computations.YARDSTICK] = dataclasses.replace(first, model=computations.YARDSTICK, fields={})
  results: dict[str, Any] = {}
  facts = common.environment() | {'chip': where.chip.name, 'compiler': where.compiler(), 'forms': results}
  for name, workload in workloads.items():
    results[name] = {'workload': dataclasses.asdict(workload), 'computations': {}}
    for computation, function, given in programs(name, workload, arguments.computation or COMPUTATIONS, device):
      print(f'{name}, {computation}', file=sys.stderr, flush=True)
      results[name]['computations'][computation] = measure(function, given, where)
      common.write_json(arguments.output, facts)  # after each: compiling may take long
  report(facts, arguments)


def report(facts: dict[str, Any], arguments: argparse.Namespace) -> None:
  """Prints the table, and the profiles if they are wanted."""
  found = [
    (name, computation, result)
    for computation in COMPUTATIONS
    for name, form in facts['forms'].items()
    for result in [form['computations'].get(computation)]
    if result
  ]
  print(
    f'{arguments.model}, {arguments.batch_size} images, {arguments.dtype}, on one {facts["chip"]}; '
    f'{facts["compiler"]}, commit {facts["commit"]}\n'
  )
  print(common.table(HEADER, (row(*each) for each in found)))
  for name, computation, result in found:
    if not result['fits']:
      print(f'\n{name}, {computation}: {result["compiler_says"]}')
    elif result['open_loops']:
      print(f'\n* {name}, {computation}: {result["open_loops"]} loops of unknown length are counted once')
  if arguments.profile:
    for name, computation, result in found:
      if result['fits']:
        print_profiles(f'{name}, {computation}', result, arguments.profile)
        print_arrays(f'{name}, {computation}', result, arguments.profile)


def main() -> None:
  """Command line."""
  arguments = parse_arguments()
  tpu.without_tpu()
  jax.config.update('jax_enable_compilation_cache', False)  # times are to be seen
  with common.one_line_errors():
    run(arguments)


if __name__ == '__main__':
  main()
