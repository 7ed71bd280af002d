"""Speed and memory of a model on the present device: `python -m benchmarks.model`.

  forward         logits of a batch, as in evaluation
  latency         the same of a single image
  adamw_step      cross entropy of a batch, gradients and AdamW: what a plain PyTorch loop does
  training_step   the step of a run by the published recipe: augmentation, loss, gradients, AdamW, moving average

With `--against torch` the PyTorch model of tests/torch_reference.py does the same beside it, eager and by
`torch.compile`, with as many threads and in bfloat16 by autocast. Each framework has a process of its own; in every
round all computations take their turn, each for `--seconds`, and ratios are taken within a round. Medians of the rounds
are shown, with minimum and maximum. Uses one device.

  share of peak   products of the computation (recomputed ones too, see `planning.flops`) against the published bfloat16
                  peak of the device, where it is known
  temporaries     memory beside arguments and results, by the compiler
  growth          the same as measured during a call: resident memory on a CPU, else the device's own count
"""

import argparse
from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import os
import statistics
import sys
from typing import Any

from benchmarks import common, computations
from benchmarks.computations import Workload
from benchmarks.jax_process import JaxComputations
from benchmarks.processes import Worker, choose_processors
from benchmarks.torch_process import TorchComputations
from t2t_vit_jax.command_line import positive
from t2t_vit_jax.errors import require

COMPUTATIONS = ('forward', 'latency', 'adamw_step', 'training_step')
HEADER = (
  'form', 'computation', 'ms', 'images/s', 'times as fast', 'share of peak', 'temporaries MB', 'growth MB',
  'compile s', 'first call s',
)  # fmt: skip
# Of T2TViT: what the PyTorch model is built from.
TORCH_ARGUMENTS = (
  'tokens_type', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'num_classes', 'image_size', 'token_dim', 'qkv_bias',
  'qk_scale', 'dropout_rate', 'attention_dropout_rate', 'stochastic_depth_rate', 'performer_dropout_rate',
  'block_type', 'dense_stages', 'growth_rate',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
  """One computation of one form by one framework.

  Attributes:
    form: its name.
    computation: of `COMPUTATIONS`.
    images: in a call.
    facts: what preparing it has told.
    seconds: measures it.
    rival: the entry it is compared with, by key; None for its own.
  """

  form: str
  computation: str
  images: int
  facts: dict[str, Any]
  seconds: Callable[[], float]
  rival: str


def prepare(
  arguments: argparse.Namespace, workloads: Mapping[str, Workload], workers: Mapping[str, Worker], notes: list[str]
) -> dict[str, Entry]:
  """Compiles everything that is to be measured."""
  wanted = arguments.computation or COMPUTATIONS
  entries: dict[str, Entry] = {}
  rivals: dict[tuple[Any, ...], str] = {}
  for computation in (x for x in COMPUTATIONS if x in wanted):
    first_key = ''
    for form, workload in workloads.items():
      if computation == 'latency':
        workload = dataclasses.replace(workload, batch_size=1)
      rival = first_key
      if 'torch' in workers and computation != 'training_step':
        rival = _prepare_torch(form, workload, computation, workers['torch'], entries, rivals, arguments, notes)
      key = f'{form}, {computation}'
      first_key = first_key or key
      say(key)
      facts = workers['jax']('prepare', key, computation, workload=workload)
      seconds = measurement(workers['jax'], key, facts, arguments.seconds)
      entries[key] = Entry(form, computation, workload.batch_size, facts, seconds, rival or key)
  return entries


def _prepare_torch(
  form: str,
  workload: Workload,
  computation: str,
  worker: Worker,
  entries: dict[str, Entry],
  rivals: dict[tuple[Any, ...], str],
  arguments: argparse.Namespace,
  notes: list[str],
) -> str:
  """The key of the eager PyTorch model that does the same; prepares it, and the compiled one, unless it is there."""
  model = computations.build_model(workload)
  fields = {field: getattr(model, field) for field in TORCH_ARGUMENTS}
  same = (computation, workload.batch_size, workload.dtype, *map(str, fields.items()))
  if same in rivals:
    return rivals[same]
  alone = not any(entry.computation == computation and entry.form.startswith('torch') for entry in entries.values())
  for name in ('torch eager', 'torch.compile'):
    shown = name if alone else f'{name} ({form})'
    key = f'{shown}, {computation}'
    say(key)
    facts = worker(
      'prepare',
      key,
      computation,
      arguments=fields,
      batch_size=workload.batch_size,
      image_size=workload.image_size,
      dtype=workload.dtype,
      compiled=name == 'torch.compile',
    )
    rivals.setdefault(same, key)
    if 'failed' in facts:
      notes.append(f'{key} does not work here: {facts["failed"]}')
      continue
    seconds = measurement(worker, key, facts, arguments.seconds)
    entries[key] = Entry(shown, computation, workload.batch_size, facts, seconds, rivals[same])
  return rivals[same]


def measurement(worker: Worker, key: str, facts: dict[str, Any], seconds: float) -> Callable[[], float]:
  """Seconds of a call, from as many as take about `seconds`."""
  return functools.partial(worker, 'seconds', key, max(1, round(seconds / facts['warm_s'])))


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def rows(entries: Mapping[str, Entry], seconds: Mapping[str, list[float]], device: dict[str, Any]) -> list[list[str]]:
  """Rows of the table."""
  table = []
  for key, entry in entries.items():
    facts, own = entry.facts, seconds[key]
    ratios = [rival / mine for rival, mine in zip(seconds[entry.rival], own, strict=True)]
    flops = facts.get('product_flops')
    share = ''
    if flops and device['peak_flops'] and facts.get('half_precision'):
      share = f'{flops / statistics.median(own) / device["peak_flops"]:.1%}'
    table.append(
      [
        entry.form,
        entry.computation,
        common.spread((1e3 * x for x in own), 1),
        f'{entry.images / statistics.median(own):,.1f}',
        common.spread(ratios) if entry.rival != key else '1',
        share,
        _megabytes(facts.get('temporaries')),
        _megabytes(facts.get('peak_growth')),
        f'{facts["compile_s"]:.1f}' if 'compile_s' in facts else '',
        f'{facts["first_s"]:.2f}',
      ]
    )
  return table


def _megabytes(size: int | None) -> str:
  return '' if size is None else f'{size / 1e6:,.0f}'


def parse_arguments() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  computations.add_arguments(parser, batch_size=16, dtype='float32')
  parser.add_argument(
    '--computation', action='append', choices=COMPUTATIONS, help='may be given often (default: all of them)'
  )
  parser.add_argument('--against', choices=['torch'], help='measure another implementation beside it')
  parser.add_argument('--rounds', type=positive, default=7, help='default %(default)s')
  parser.add_argument(
    '--seconds', type=float, default=1.0, help='that each computation takes in a round, about (default %(default)s)'
  )
  parser.add_argument('--threads', type=positive, help='processors of each framework (default: all of them)')
  common.add_output(parser)
  return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
  """Measures everything, prints the table, and writes the file.

  Raises:
    UserError: something about the arguments is wrong, or a process ran out of memory.
  """
  common.check_output(arguments.output)
  processors = choose_processors(arguments.threads)
  workloads = computations.workloads(arguments, ['default'], check=False)  # here JAX must not take the device
  if arguments.against:
    require('--against torch', 'torch')
    os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.45')  # a GPU's memory is for both
  notes: list[str] = []
  load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0.0
  if load > 0.5:  # threads that wait for each other suffer most: PyTorch's more than XLA's
    notes.append(f'other processes were at work (load {load:.1f} at the start): measure on a quiet machine')
  with contextlib.ExitStack() as stack:
    workers = {'jax': Worker('JAX', JaxComputations, processors)}
    if arguments.against:
      workers['torch'] = Worker('PyTorch', TorchComputations, processors)
    for worker in workers.values():
      stack.callback(worker.close)
    devices = {name: worker('device') for name, worker in workers.items()}
    entries = prepare(arguments, workloads, workers, notes)
    say(f'{arguments.rounds} rounds')
    seconds = common.in_turn({key: entry.seconds for key, entry in entries.items()}, arguments.rounds)
  facts = common.environment((*common.PACKAGES, 'torch')) | {
    'devices': devices,
    'threads': arguments.threads,
    'load': load,
    'notes': notes,
    'entries': [
      {
        'form': entry.form,
        'computation': entry.computation,
        'images': entry.images,
        'rival': entry.rival,
        **entry.facts,
        'seconds': seconds[key],
      }
      for key, entry in entries.items()
    ],
  }
  common.write_json(arguments.output, facts)
  kinds = ' and '.join(f'{name}: {device["kind"]}' for name, device in devices.items())
  print(f'{arguments.model}, {kinds}, {arguments.threads or os.cpu_count()} of {os.cpu_count()} processors ')
  print(f'({facts["cpu"]}); {facts["versions"]}, commit {facts["commit"]}\n')
  print(common.table(HEADER, rows(entries, seconds, devices['jax'])))
  print('\ntimes as fast: as the eager PyTorch model, or as the first form')
  for note in notes:
    print(f'note: {note}')


def main() -> None:
  """Command line."""
  arguments = parse_arguments()
  with common.one_line_errors():
    run(arguments)


if __name__ == '__main__':
  main()
