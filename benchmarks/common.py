"""Parts of all benchmarks: forms on the command line, rounds in turn, tables, and files with their circumstances."""

import argparse
import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import statistics
import subprocess
from typing import Any

from t2t_vit_jax.command_line import fail
from t2t_vit_jax.errors import UserError

PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'numpy')


def environment(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
  """Versions and machine, for the file of results."""
  commit = subprocess.run(
    ['git', 'describe', '--always', '--dirty'],
    cwd=Path(__file__).parent,
    capture_output=True,
    text=True,
    check=False,
  )
  versions = {}
  for package in packages:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return {
    'commit': commit.stdout.strip(),
    'cpu': _processor(),
    'cores': os.cpu_count(),
    'python': platform.python_version(),
    'versions': versions,
  }


def _processor() -> str:
  with contextlib.suppress(OSError):
    for line in Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.split(':')[1].strip()
  return platform.processor() or platform.machine()


def parse_form(text: str) -> tuple[str, dict[str, Any]]:
  """A name and the fields that make it: 'small:depth=2,soft_split_form=patches'.

  Values are Python's numbers, strings, tuples, True, False and None; strings need no quotes.

  Raises:
    UserError: it is written in another way.
  """
  name, _, fields = text.partition(':')
  try:
    call: Any = ast.parse(f'form({fields})', mode='eval').body
    if not isinstance(call, ast.Call) or call.args or not name.strip():
      raise ValueError
    return name.strip(), {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
  except (SyntaxError, ValueError) as error:
    raise UserError(f'--form={text}: write NAME:FIELD=VALUE,FIELD=VALUE, such as small:depth=2,remat=none') from error


def _value(node: ast.expr) -> Any:
  return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def forms(
  texts: Sequence[str] | None, known: Mapping[str, dict[str, Any]], defaults: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """The forms that --form gives, or the default ones; a known one may be given by its name alone.

  Raises:
    UserError: one is not written right or not known, or two have the same name.
  """
  chosen: dict[str, dict[str, Any]] = {}
  for text in texts or defaults:
    if ':' not in text and text not in known:
      raise UserError(f'--form={text}: known by name are {", ".join(known)}; others are written NAME:FIELD=VALUE,...')
    name, fields = (text, known[text]) if text in known else parse_form(text)
    if name in chosen:
      raise UserError(f'--form: two are named {name}')
    chosen[name] = fields
  return chosen


def in_turn(measurements: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
  """Results of each measurement in each round, in which all take their turn: other work on the machine meets all.

  Every second round runs backwards, so that none always follows the same one.
  """
  results: dict[str, list[float]] = {name: [] for name in measurements}
  for number in range(rounds):
    for name in list(measurements)[:: -1 if number % 2 else 1]:
      results[name].append(measurements[name]())
  return results


def spread(values: Iterable[float], digits: int = 2) -> str:
  """Median (minimum to maximum)."""
  values = list(values)
  return f'{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table in Markdown that is also aligned, for a terminal."""
  lines = [list(header), *map(list, rows)]
  widths = [max(len(cells[i]) for cells in lines) for i in range(len(header))]
  lines.insert(1, ['-' * width for width in widths])
  return '\n'.join(f'| {" | ".join(map(str.ljust, cells, widths))} |' for cells in lines)


def check_output(path: str | None, option: str = '--output') -> None:
  """Refuses a file that could not be written, at the start of a benchmark that may take long.

  Raises:
    UserError: no file can be written at `path`.
  """
  if path is None:
    return
  folder = Path(path).absolute().parent
  if not folder.is_dir():
    raise UserError(f'{option}: there is no folder {folder}')
  if not os.access(folder, os.W_OK) or Path(path).is_dir():
    raise UserError(f'{option}: {path} is not a file that can be written')


def write_json(path: str | None, results: Mapping[str, Any]) -> None:
  """Writes results, if `path` is one; whole or not at all."""
  if path is None:
    return
  partial = Path(f'{path}.partial')
  partial.write_text(json.dumps(results, indent=1) + '\n')
  partial.replace(path)


def add_output(parser: argparse.ArgumentParser) -> None:
  """Adds --output."""
  parser.add_argument('--output', help='JSON file for all results, with versions, machine and commit')


@contextlib.contextmanager
def one_line_errors() -> Any:
  """Ends the program with a line and exit code 2 where input is wrong."""
  try:
    yield
  except UserError as error:
    fail(str(error))
