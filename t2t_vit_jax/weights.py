"""Lists the published weights, and fetches them: t2t-vit weights [NAME ...]

docs/models.md tells more about them.
"""

import argparse
from collections.abc import Iterator
import json
import sys
from typing import Any

from t2t_vit_jax.command_line import Parser, run_tool
from t2t_vit_jax.conversion import pretrained
from t2t_vit_jax.errors import UserError, did_you_mean
from t2t_vit_jax.models.published import PUBLISHED


def rows() -> Iterator[dict[str, Any]]:
  """The published weights, with the path of those that are in the cache folder and None for the others."""
  for name, row in PUBLISHED.items():
    file = pretrained.cached_file(name)
    yield {
      'name': name,
      'model': row.model,
      'data': row.data,
      'num_classes': row.num_classes,
      'image_size': row.image_size,
      'top1': row.top1,
      'measured_top1': row.measured[0] if row.measured else None,
      'measured_top5': row.measured[1] if row.measured else None,
      'publisher': row.publisher,
      'download': row.download_size,
      'url': row.url,
      'cached': str(file) if file.is_file() else None,
    }


def table() -> Iterator[str]:
  """Lines of text, one for each of the published weights, under a heading."""
  form = '{:27}{:29}{:>5}{:>12}{:>11}{:>10}{:>14}  {}'
  yield form.format('name', 'trained on', 'px', 'by', 'published', 'measured', 'download', '').rstrip()
  for row in rows():
    state = 'in the cache' if row['cached'] else ''
    facts = row['name'], row['data'], row['image_size'], row['publisher'], row['top1']
    yield form.format(*facts, row['measured_top1'] or '', row['download'], state).rstrip()
  yield 'published: top-1 in per cent; measured: the same, by another group with the published file'
  yield f'cache folder: {pretrained.cache_folder()} ({pretrained.CACHE} sets another)'


def run(arguments: argparse.Namespace) -> int:
  """Does what the command line asks for; returns the exit code."""
  if unknown := [name for name in arguments.names if name not in PUBLISHED]:
    raise UserError(f'there are no published weights {unknown[0]}: {did_you_mean(unknown[0], PUBLISHED)}')
  if arguments.names and arguments.json:
    raise UserError('--json lists all published weights: leave the names out')
  if arguments.json:
    print(json.dumps(list(rows()), indent=1))
  elif arguments.names:
    for name in arguments.names:
      print(pretrained.fetch(name), flush=True)
  else:
    print('\n'.join(table()))
  return 0


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = Parser(
    'weights',
    example='t2t-vit weights t2t_vit_7',
    description='Lists the published weights; with names, fetches those into the cache folder and prints their files.',
    epilog=f'{pretrained.MIRROR}=URL fetches from a folder on another server.',
  )
  parser.add_argument('names', metavar='NAME', nargs='*', help='name of published weights')
  parser.add_argument('--json', action='store_true', help='list as JSON')
  return run_tool(lambda: run(parser.parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main())
