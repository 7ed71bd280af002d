"""Growth of a model's cost with image size, depth and batch: `python -m benchmarks.scaling --plot scaling.png`.

Over image sizes also the tokens-to-token module alone, with both attentions: the performer is linear in the number of
tokens, the transformer quadratic; and the transformer with all scores in memory. Costs are of one image.

  GFLOP         products, counted from what JAX hands to the compiler, loops as often as they run: see `planning.flops`
                (XLA's own count has the body of a loop once, such as that of the chunked attention)
  MB moved      operands and results of all operations of the program that was compiled for this device, loops as often
                as they run; on a CPU caches keep some of it
  temporaries   MB of memory beside arguments and results, by the compiler; for CPUs both are of a program without
                YNNPACK, whose fusions hide what is inside of them
  ms            with --rounds: measured on the present device, all in turn; medians, with minimum and maximum
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import itertools
import math
import statistics
import sys
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from benchmarks import common, computations
from benchmarks.computations import Workload
from t2t_vit_jax.command_line import positive
from t2t_vit_jax.errors import require
from t2t_vit_jax.models.soft_split import SPLITS, token_grid
from t2t_vit_jax.models.tokens_to_token import TokensToToken
from t2t_vit_jax.models.variants import get_variant
from t2t_vit_jax.planning.flops import count_flops
from t2t_vit_jax.planning.schedule import read_schedule

SIZES = (112, 160, 224, 288, 384, 512)
DEPTHS = (2, 6, 10, 14, 24)
BATCHES = (1, 4, 16, 64)
# Curves over image sizes: T2TViT's fields, and whether they are of the module alone.
CURVES: dict[str, tuple[dict[str, Any], bool]] = {
  'T2T module, performer': ({'tokens_type': 'performer'}, True),
  'T2T module, transformer': ({'tokens_type': 'transformer'}, True),
  'T2T module, transformer, all scores': ({'tokens_type': 'transformer', 'token_attention_form': 'full'}, True),
  'model, performer': ({'tokens_type': 'performer'}, False),
  'model, transformer': ({'tokens_type': 'transformer'}, False),
}
COSTS = {
  'flops': ('GFLOP', 1e9),
  'moved': ('MB moved', 1e6),
  'temporaries': ('MB temporaries', 1e6),
  'seconds': ('ms', 1e-3),
}


class Module(nn.Module):
  """The tokens-to-token module of a model, with the sum of each token as its result: something to differentiate."""

  module: TokensToToken

  def __call__(self, images: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, T)."""
    tokens = self.module(images)
    return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1]).sum(axis=-1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Point:
  """A model or its module, of some size, on one of the curves of a sweep; `tokens` are those of the first attention."""

  sweep: str
  curve: str
  workload: Workload
  alone: bool

  @property
  def value(self) -> int:
    """Position on the axis of its sweep."""
    if self.sweep == 'depth':
      return self.workload.fields['depth']
    return self.workload.batch_size if self.sweep == 'batch size' else self.workload.image_size

  @property
  def tokens(self) -> int:
    """Number of tokens of the first attention."""
    return SPLITS[0].output_size(self.workload.image_size) ** 2

  def model(self) -> Any:
    """See `Module`, or a T2T-ViT."""
    model = computations.build_model(self.workload)
    if not self.alone:
      return model
    return Module(
      TokensToToken(
        model.tokens_type,
        model.embed_dim,
        token_dim=model.token_dim,
        soft_split_form=model.soft_split_form,
        token_attention_form=model.token_attention_form,
        dtype=model.dtype,
      )
    )


def points(arguments: argparse.Namespace) -> list[Point]:
  """Everything that is to be known.

  Raises:
    UserError: something about the arguments does not fit together.
  """
  size = arguments.image_size or get_variant(arguments.model).data.image_size
  base = Workload(arguments.model, arguments.batch_size, size, arguments.dtype)

  def changed(**fields: Any) -> Workload:
    own = {field: fields.pop(field) for field in computations.OWN_FIELDS if field in fields}
    return dataclasses.replace(base, fields=fields, **own)

  all_points = [
    Point('image size', curve, changed(image_size=image_size, **fields), alone)
    for curve, (fields, alone) in CURVES.items()
    for image_size in arguments.sizes
  ]
  all_points += [Point('depth', 'model', changed(depth=depth), False) for depth in arguments.depths]
  all_points += [Point('batch size', 'model', changed(batch_size=batch), False) for batch in arguments.batches]
  for point in all_points:
    computations.build_model(point.workload)
    token_grid((point.workload.image_size,) * 2)  # raises if a split finds no patch
  return all_points


def cost(point: Point, gradients: bool, compile_it: bool, time_it: bool) -> tuple[dict[str, float], Any]:
  """Costs of one image, and a function that measures how long a batch takes, if it is to be timed."""
  model, workload = point.model(), point.workload
  function, arguments = program(model, workload, gradients)
  costs = {'flops': count_flops(function, *arguments) / workload.batch_size}
  if not compile_it:
    return costs, None
  compiled = computations.compile_to_count(function, arguments)
  moved = read_schedule(compiled.as_text()).hbm_bytes
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  costs |= {'moved': moved / workload.batch_size, 'temporaries': temporaries / workload.batch_size}
  return costs, stopwatch(function.lower(*arguments).compile(), arguments) if time_it else None


def program(model: Any, workload: Workload, gradients: bool) -> tuple[Any, tuple[Any, ...]]:
  """The forward pass, or the gradients of its mean square, as a jitted function, with its arguments described."""

  def forward(variables: Any, images: Any) -> Any:
    return model.apply(variables, images)

  def gradient(variables: Any, images: Any) -> Any:
    rest = {name: tree for name, tree in variables.items() if name != 'params'}
    return jax.grad(lambda params: (model.apply({**rest, 'params': params}, images) ** 2).mean())(variables['params'])

  arguments = computations.variables_of(model, workload), computations.images_of(workload)
  return jax.jit(gradient if gradients else forward), arguments


def stopwatch(compiled: Any, arguments: Any) -> Callable[[], float]:
  """Measures a call of a program, with zeros for arguments, which take as long as others."""
  filled = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arguments)
  jax.block_until_ready(compiled(*filled))

  def measure() -> float:
    start = time.perf_counter()
    jax.block_until_ready(compiled(*filled))
    return time.perf_counter() - start

  return measure


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
  """Exponent of the power of x that y grows with, between the last two points."""
  return math.log(ys[-1] / ys[-2]) / math.log(xs[-1] / xs[-2]) if ys[-1] and ys[-2] else math.nan


def curves_of(results: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
  """Results by sweep and curve."""
  grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for result in results:
    grouped.setdefault((result['sweep'], result['curve']), []).append(result)
  return grouped


def middle(result: Mapping[str, Any], cost: str) -> float:
  """A cost, or the median of its measurements."""
  value = result[cost]
  return statistics.median(value) if isinstance(value, list) else value


def print_tables(results: Sequence[dict[str, Any]]) -> None:
  """One for each sweep, and the growth with tokens."""
  known = [cost for cost in COSTS if cost in results[0]]
  for sweep, group in itertools.groupby(results, key=lambda result: result['sweep']):
    rows = []
    for result in group:
      cells = [f'{result[cost] / COSTS[cost][1]:,.2f}' for cost in known if cost != 'seconds']
      if 'seconds' in known:
        cells.append(common.spread((x / COSTS['seconds'][1] for x in result['seconds']), 1))
      rows.append([result['curve'], f'{result["value"]:,}', f'{result["tokens"]:,}', *cells])
    print(f'\nOne image, by {sweep}\n')
    print(common.table(('', sweep, 'first tokens', *(COSTS[cost][0] for cost in known)), rows))
  grown = {curve: group for (sweep, curve), group in curves_of(results).items() if sweep == 'image size'}
  if all(len(group) > 1 for group in grown.values()):
    print('\nGrows with the number of tokens to the power of (between the two largest images)\n')
    rows = [
      [curve] + [f'{exponent([x["tokens"] for x in group], [middle(x, cost) for x in group]):.2f}' for cost in known]
      for curve, group in grown.items()
    ]
    print(common.table(('', *(COSTS[cost][0] for cost in known)), rows))


def plot(results: Sequence[dict[str, Any]], title: str, path: str) -> None:
  """A picture: a row for each sweep, a column for each cost."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  from matplotlib.ticker import NullFormatter

  known = [cost for cost in COSTS if cost in results[0]]
  sweeps = list(dict.fromkeys(result['sweep'] for result in results))
  figure, axes = plt.subplots(
    len(sweeps),
    len(known),
    figsize=(4.4 * len(known) + 3, 3.4 * len(sweeps) + 1),
    squeeze=False,
    layout='constrained',
  )
  for (sweep, curve), group in curves_of(results).items():
    for column, name in enumerate(known):
      panel = axes[sweeps.index(sweep)][column]
      xs = [x['tokens'] if sweep == 'image size' else x['value'] for x in group]
      ys = [middle(x, name) / COSTS[name][1] for x in group]
      style = {'linestyle': '--'} if curve.endswith('all scores') else {'color': 'black'} if curve == 'model' else {}
      panel.plot(xs, ys, marker='o', markersize=4, label=curve, **style)
      if isinstance(group[0][name], list):
        low, high = ([bound(x[name]) / COSTS[name][1] for x in group] for bound in (min, max))
        panel.fill_between(xs, low, high, alpha=0.2)
  for row, sweep in enumerate(sweeps):
    for column, name in enumerate(known):
      panel = axes[row][column]
      panel.grid(alpha=0.3)
      panel.set_ylabel(COSTS[name][0])
      if sweep == 'image size':
        panel.set(xscale='log', yscale='log', xlabel='tokens of the first attention (image size, px)')
        sizes = {x['tokens']: x['value'] for x in results if x['sweep'] == sweep}
        panel.set_xticks(list(sizes), [f'{tokens:,}\n({size})' for tokens, size in sizes.items()], fontsize=8)
        panel.xaxis.minorticks_off()
        panel.yaxis.set_major_formatter('{x:g}')
        panel.yaxis.set_minor_formatter(NullFormatter())
        guides(panel)
      else:
        values = sorted({x['value'] for x in results if x['sweep'] == sweep})
        panel.set(xlabel=sweep if sweep == 'batch size' else 'depth, blocks', ylim=(0, 1.1 * panel.get_ylim()[1]))
        panel.set_xscale('log' if sweep == 'batch size' else 'linear')
        panel.set_xticks(values, [f'{value:,}' for value in values])
        panel.minorticks_off()
    axes[row][0].set_title(f'By {sweep}', loc='left', fontweight='bold')
  lines = dict(pair[::-1] for panel in axes[:, 0] for pair in zip(*panel.get_legend_handles_labels(), strict=True))
  figure.legend(lines.values(), lines.keys(), loc='outside right upper', fontsize=9)
  figure.suptitle(f'Cost of an image: {title}')
  figure.savefig(path, dpi=110)
  plt.close(figure)


def guides(panel: Any) -> None:
  """Thin lines that grow with the tokens, and with their square."""
  (left, right), (low, high) = panel.get_xlim(), panel.get_ylim()
  low, high = low / 1.5, high * 1.5
  growth = right / left
  for power, style, label, start in ((1, ':', 'linear', low), (2, '-.', 'quadratic', high / growth**2)):
    panel.plot([left, right], [start, start * growth**power], style, color='gray', lw=1, zorder=0, label=label)
  panel.set(xlim=(left, right), ylim=(low, high))


def whole_numbers(text: str) -> tuple[int, ...]:
  """Reads numbers such as '112,224', for argparse."""
  return tuple(sorted(map(positive, text.split(','))))


def parse_arguments() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  computations.add_arguments(parser, batch_size=4, dtype='float32', forms=False)
  for name, values in (('sizes', SIZES), ('depths', DEPTHS), ('batches', BATCHES)):
    shown = ','.join(map(str, values))
    parser.add_argument(f'--{name}', type=whole_numbers, default=values, metavar='N,N,...', help=f'default {shown}')
  parser.add_argument('--gradients', action='store_true', help='of the parameters, not the forward pass alone')
  parser.add_argument('--flops-only', action='store_true', help='compile nothing')
  parser.add_argument('--rounds', type=positive, help='measure the time too, in so many rounds')
  parser.add_argument('--plot', metavar='FILE', help='picture to draw, such as scaling.png')
  common.add_output(parser)
  arguments = parser.parse_args()
  if arguments.rounds and arguments.flops_only:
    parser.error('--rounds needs compiled programs, and --flops-only makes none')
  return arguments


def run(arguments: argparse.Namespace) -> None:
  """Finds out, prints the tables, draws the picture, and writes the file.

  Raises:
    UserError: something about the arguments is wrong.
  """
  common.check_output(arguments.output)
  common.check_output(arguments.plot, '--plot')
  if arguments.plot:
    require('--plot', 'matplotlib')
  all_points = points(arguments)
  results, stopwatches = [], {}
  for number, point in enumerate(all_points):
    print(f'{number + 1} of {len(all_points)}: {point.curve}, {point.sweep} {point.value}', file=sys.stderr, flush=True)
    costs, watch = cost(point, arguments.gradients, not arguments.flops_only, bool(arguments.rounds))
    results.append({'sweep': point.sweep, 'curve': point.curve, 'value': point.value, 'tokens': point.tokens, **costs})
    if watch:
      stopwatches[str(number)] = watch
  for key, seconds in common.in_turn(stopwatches, arguments.rounds or 0).items():
    results[int(key)]['seconds'] = [x / all_points[int(key)].workload.batch_size for x in seconds]
  kind = jax.devices()[0].device_kind
  facts = common.environment() | {'device': kind, 'arguments': vars(arguments), 'results': results}
  common.write_json(arguments.output, facts)
  what = 'gradients' if arguments.gradients else 'forward pass'
  title = f'{arguments.model}, {arguments.dtype}, {what}'
  print(f'{title}, compiled for {kind}; jax {facts["versions"]["jax"]}, commit {facts["commit"]}')
  print_tables(results)
  if arguments.plot:
    plot(results, title, arguments.plot)


def main() -> None:
  """Command line."""
  arguments = parse_arguments()
  with common.one_line_errors():
    run(arguments)


if __name__ == '__main__':
  main()
