"""Figures of compiled programs that need no clock: `python -m tests.speed_guard` renews tests/speed_guard.json.

Run it after a change that makes a program cheaper, or dearer on purpose, and after an upgrade of JAX; the parts for TPU
and GPU need their compilers (the extras tpu and gpu-plan) and stay as they are without. See `test_speed_guard` for what
is compared.
"""

import importlib.metadata
import importlib.util
import json
from pathlib import Path
import sys

from benchmarks import computations
from benchmarks.computations import Workload
from t2t_vit_jax.planning import topology, tpu
from t2t_vit_jax.planning.compilation import compile_program, figures
from t2t_vit_jax.planning.flops import count_flops
from t2t_vit_jax.recipe import sharding

GOLDEN = Path(__file__).with_suffix('.json')
LITERAL = computations.FORMS['literal']
LOOP = {'scan_blocks': True, 'depth': 8}
# Few blocks, unless they are a loop: all are alike, and compiling takes long.
CPU = {
  'forward, literal': (computations.forward, LITERAL),
  'forward': (computations.forward, {}),
  'value_and_grad, literal': (computations.value_and_grad, LITERAL),
  'value_and_grad': (computations.value_and_grad, {}),
  'value_and_grad, loop': (computations.value_and_grad, LOOP),
  'value_and_grad, loop with remat': (computations.value_and_grad, {**LOOP, 'remat': 'nothing_saveable'}),
}
TPU = {name: CPU[name] for name in ('forward, literal', 'forward')}  # gradients compile for minutes
GPU = {name: CPU[name] for name in (*TPU, 'value_and_grad, literal', 'value_and_grad')}


def versions(*packages):
  return {package: importlib.metadata.version(package) for package in packages}


def program(function, workload, where=None):
  """A jitted function and descriptions of its arguments."""
  model = computations.build_model(workload)
  arguments = [computations.variables_of(model, workload, where), computations.images_of(workload, where)]
  if function is computations.value_and_grad:
    arguments.append(computations.labels_of(workload, where))
  return computations.jitted(function, model, where), arguments


def cpu_figures():
  """Of programs compiled for this machine's CPU, without a library's fusions."""
  found = {}
  for name, (function, fields) in CPU.items():
    jitted, arguments = program(function, Workload('t2t_vit_14', 8, 224, 'float32', {'depth': 2, **fields}))
    compiled = computations.compile_to_count(jitted, arguments)
    costs = compiled.cost_analysis()
    found[name] = {
      'product_flops': count_flops(jitted, *arguments),
      'flops': costs['flops'],
      'bytes': costs['bytes accessed'],
      'temporaries': compiled.memory_analysis().temp_size_in_bytes,
    }
  return {'versions': versions('jax', 'jaxlib'), 'figures': found}


def tpu_figures():
  """Of programs compiled for one v5e."""
  found = figures_elsewhere('v5e:2x2', TPU, ('flops', 'hbm_bytes', 'temporaries', 'cycles'))
  return {'versions': versions('jax', 'jaxlib', 'libtpu'), 'figures': found}


def gpu_figures():
  """Figures of programs compiled for one H100."""
  found = figures_elsewhere('h100', GPU, ('launches', 'hbm_bytes', 'temporaries'))
  return {'versions': versions('jax', 'jaxlib', 'jax-cuda13-pjrt'), 'figures': found}


def figures_elsewhere(chip, programs, kinds):
  """Figures of programs compiled for a device that need not be there."""
  where = topology.parse(chip)
  replicated = sharding.replicated(computations.one_device_mesh(where.devices()[0]))
  found = {}
  for name, (function, fields) in programs.items():
    workload = Workload('t2t_vit_14', 128, 224, 'bfloat16', {'depth': 1, **fields})
    compiled, _ = compile_program(*program(function, workload, replicated), where)
    known = figures(compiled, where.chip, product_flops=0)
    found[name] = {kind: known[kind] for kind in kinds}
  return found


def main():
  """With 'tpu' or 'gpu' as argument it prints that part, for the tests."""
  tpu.without_tpu()
  parts = {'cpu': (cpu_figures, 'jax'), 'tpu': (tpu_figures, 'libtpu'), 'gpu': (gpu_figures, 'jax_cuda13_plugin')}
  if sys.argv[1:]:
    print(json.dumps(parts[sys.argv[1]][0]()))
    return
  golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
  for name, (part, compiler) in parts.items():
    if importlib.util.find_spec(compiler):
      golden[name] = part()
  GOLDEN.write_text(json.dumps(golden, indent=1) + '\n')


if __name__ == '__main__':
  main()
