"""Shows plans to people: as lines, or as rows of a table. `plan.make_plan` makes them."""

from collections.abc import Sequence
import itertools
from typing import Any

from t2t_vit_jax.errors import plural, readable_size

GIB = 2**30
COLUMNS = (
  'model',
  'px',
  'slice',
  'images (a chip)',
  'HBM, GiB',
  'GFLOP',
  'HBM traffic, GB',
  'collectives',
  'launches',
  'roofline bound',
  "compiler's estimate",
  'compiled in',
)


def describe(plan: dict[str, Any]) -> list[str]:
  """Lines that describe a plan."""
  config, mesh, group_size = plan['config'], plan['mesh'], plan['mixing_group_size']
  spans_chips = plan['images_per_chip'] % group_size != 0
  seconds = [f'{step["compile_s"]:.0f} s' for step in (plan['train_step'], plan['eval_step']) if step['fits']]
  return [
    f'{config["model"]["name"]}, {plan["parameters"]:,} trained parameters, {config["model"]["dtype"]}, '
    f'{config["data"]["image_size"]} px',
    f'{plan["slice"]}: {plural(plan["chips"], "chip")} of {plural(plan["hosts"], "host")}, '
    f'mesh data {mesh["data"]} x fsdp {mesh["fsdp"]}, {plan["state"] / GIB:.3f} GiB of state on each chip',
    f'batch: {config["data"]["batch_size"]} images, {plan["images_per_chip"]} on each chip; '
    f'{plan["total_steps"]:,} steps',
    *[f'mixing groups of {group_size} images span chips, which exchange pixels; results do not change'] * spans_chips,
    f'compiled by {plan["compiler"]}, in {" and ".join(seconds)}' if seconds else f'compiler: {plan["compiler"]}',
    *_describe_step('training step', plan['train_step'], plan['chip']),
    *_describe_step('evaluation step', plan['eval_step'], plan['chip']),
  ]


def _describe_step(name: str, step: dict[str, Any], chip: dict[str, Any]) -> list[str]:
  lines = [f'{name}, on each chip:', f'  memory: {memory(step, chip["hbm_gib"])}']
  if not step['fits']:
    return lines
  estimate = []
  if 'compiler_estimate_ms' in step:
    estimate = [
      f"  the compiler's estimate, not a measurement, {step['cycles']:,} cycles at {chip['clock'] / 1e9:.2f} GHz: "
      f'{_speed(step, "compiler_estimate")}'
    ]
  parts = ', '.join(f'{part} {step[part] / GIB:.3g}' for part in ('arguments', 'temporaries', 'outputs', 'program'))
  open_loops = f'; {step["open_loops"]} loops of unknown length are counted once' if step['open_loops'] else ''
  return [
    *lines,
    f'    {parts}',
    f'  work: {step["flops"] / 1e9:,.1f} GFLOP, {readable_size(step["hbm_bytes"])} to and from HBM, '
    f'{step["launches"]:,} launches{open_loops}',
    f'  collectives: {collectives(step)}',
    f'  at the published {chip["flops"] / 1e12:g} TFLOP/s and {chip["bandwidth"] / 1e9:g} GB/s: '
    f'{step["arithmetic_ms"]:.3g} ms for the work, {step["bandwidth_ms"]:.3g} ms for the traffic',
    f'  roofline bound, the longer of both, not a measurement: {_speed(step, "roofline")}',
    *estimate,
  ]


def memory(step: dict[str, Any], hbm_gib: float) -> str:
  """A phrase: the memory of a chip that a step takes, and whether it fits."""
  if step['fits']:
    return f'fits, {step["memory"] / GIB:.2f} of {hbm_gib:.4g} GiB'
  return f'DOES NOT FIT: {step["compiler_says"]}'


def _speed(step: dict[str, Any], kind: str) -> str:
  text = f'{step[f"{kind}_ms"]:.3g} ms'
  return text + (', {images_per_s:,.0f} images/s, {days:.2g} days'.format(**step[kind]) if kind in step else '')


def collectives(step: dict[str, Any]) -> str:
  """A phrase: the transfers of a step, added up by kind, with the bytes of their results on a chip."""

  def group_key(transfer: dict[str, Any]) -> tuple[bool, str]:
    return transfer['in_open_loop'], transfer['kind']

  texts = []
  for (is_open, kind), group in itertools.groupby(sorted(step['collectives'], key=group_key), key=group_key):
    transfers = list(group)
    count, size = sum(x['count'] for x in transfers), sum(x['count'] * x['num_bytes'] for x in transfers)
    dtypes = '+'.join(sorted({dtype for x in transfers for dtype in x['dtype'].split('+')}))
    amount = readable_size(size)
    texts.append(f'{count} {kind} of {amount} {dtypes}' + (' in loops of unknown length' if is_open else ''))
  return ', '.join(texts) or 'none'


def table(plans: Sequence[dict[str, Any]], markdown: bool) -> list[str]:
  """Lines of a table with a row for the training step of each plan, and a line that names the compiler."""
  rows = [list(COLUMNS), *map(_row, plans)]
  compilers = ' and '.join(sorted({plan['compiler'] for plan in plans}))
  if markdown:
    rows.insert(1, ['---'] * len(COLUMNS))
    return [*(f'| {" | ".join(cells)} |' for cells in rows), '', f'Compiled by {compilers}.']
  widths = [max(len(cells[i]) for cells in rows) for i in range(len(COLUMNS))]
  lines = ('  '.join(map(str.ljust, cells, widths)).rstrip() for cells in rows)
  return [*lines, f'compiled by {compilers}']


def _row(plan: dict[str, Any]) -> list[str]:
  config, step = plan['config'], plan['train_step']
  cells = [
    config['model']['name'],
    str(config['data']['image_size']),
    plan['slice']
    if '/' in plan['slice'] or plan['mesh']['fsdp'] == 1
    else f'{plan["slice"]}/fsdp={plan["mesh"]["fsdp"]}',
    f'{config["data"]["batch_size"]} ({plan["images_per_chip"]})',
    memory(step, plan['chip']['hbm_gib']),
  ]
  if not step['fits']:
    return cells + [''] * (len(COLUMNS) - len(cells))
  return [
    *cells,
    f'{step["flops"] / 1e9:,.0f}',
    f'{step["hbm_bytes"] / 1e9:,.2f}',
    collectives(step),
    f'{step["launches"]:,}',
    _speed(step, 'roofline'),
    _speed(step, 'compiler_estimate') if 'compiler_estimate_ms' in step else '',
    f'{step["compile_s"]:.0f} s',
  ]
