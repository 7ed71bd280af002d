"""Command lines, with and without --config=FILE and --config.FIELD=VALUE: an error is one line and exit code 2."""

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import errno
import io
import os
from pathlib import Path
import re
import runpy
import sys
from typing import Any, NoReturn

from absl import flags, logging

from t2t_vit_jax.errors import UserError, did_you_mean, first_line, printable, show_warnings_as_lines
from t2t_vit_jax.interrupts import OWN_PROGRAM, end_if_unheard, imports_are_done


class Parser(argparse.ArgumentParser):
  """Parser for tools without a config: raises UserError for wrong arguments, and takes no abbreviations of flags."""

  def __init__(self, **options: Any):
    super().__init__(allow_abbrev=False, **options)

  def parse_args(self, argv: Any = None, namespace: Any = None) -> Any:
    """Parses `argv`, or the program's own; see `with_home`. Flags may have hyphens in place of underscores."""
    argv = with_home(sys.argv[1:] if argv is None else argv)
    flags = argv.index('--') if '--' in argv else len(argv)  # what comes after it are names
    return super().parse_args([*map(_with_underscores, argv[:flags]), *argv[flags:]], namespace)

  def error(self, message: str) -> NoReturn:
    raise UserError(message)


def start_program() -> None:
  """Lets Ctrl-C clean up from now on, shows warnings as lines, and puts the null device for streams that are closed."""
  imports_are_done()
  show_warnings_as_lines()
  for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open to the end)


def with_home(argv: Sequence[str]) -> list[str]:
  """Replaces ~ at the start of arguments and of flags' values by the home folder, which shells do not in --flag=~/x."""
  return [re.sub(r'^(-[^=]*=)?~(?=/|$)', lambda match: (match[1] or '') + os.path.expanduser('~'), x) for x in argv]


def _with_underscores(argument: str) -> str:
  """A flag with underscores in its name in place of hyphens; any other argument as it is."""
  name, equals, value = argument.partition('=')
  return f'--{name[2:].replace("-", "_")}{equals}{value}' if name.startswith('--') else argument


def run_tool(tool: Callable[[], int]) -> int:
  """Runs the `main` of a tool with such a parser and returns its exit code: 2 after a line about the user's error."""
  start_program()
  from t2t_vit_jax.processes import leave  # late: it imports jax

  def end(code: int) -> int:
    """Ends the program as it is: Python would free memory that JAX may still write to, and crash."""
    return leave(code) if OWN_PROGRAM else code

  def interrupted() -> int:
    print_message('interrupted')
    return end(130)  # the shells' code for Ctrl-C

  end_if_unheard(interrupted)
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')  # for letters that a terminal lacks
  try:
    code = tool()
    sys.stdout.flush()
    return code
  except KeyboardInterrupt:
    return interrupted()
  except UserError as error:
    message = str(error)
  except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
    _drop_output()
    return end(141)
  except OSError as error:  # such as a full disk
    _drop_output()
    message = str(error)
    if error.errno == errno.ENOSPC and not error.filename:
      message = f'standard output cannot be written: {error.strerror}'
  except (RuntimeError, AssertionError):
    message = _missing_devices()
    if not message:
      raise
  print_error(message)
  return end(2)


def _missing_devices() -> str:
  """A line that says that JAX cannot use its devices; empty if it can."""
  from t2t_vit_jax.processes import check_devices  # late: it imports jax

  try:
    check_devices()
  except UserError as error:
    return str(error)
  return ''


def _drop_output() -> None:
  """Sends the rest of standard output nowhere, or Python would fail again when it ends."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def refusing_bad_flags(argv: list[str], default_config: str | None = None) -> Iterator[None]:
  """Context in which flags, among them `config`, are defined and parsed: ends the program if one is wrong.

  An unknown config field is refused like an unknown flag.

  Args:
    argv: the command line.
    default_config: the config file if `argv` names none; None if it must name one.
  """
  file = config_file(argv) or default_config
  try:
    # ml_collections reads the overrides of a default config as soon as the flag is defined.
    yield
  except (AttributeError, KeyError):
    _refuse_unknown_field(argv, file)
    raise
  except (flags.Error, OSError) as error:
    if file is not None and Path(file).is_file():
      fail(first_line(error, kind=False))
  if file is None:
    fail('which run? Give --config=FILE, such as --config=configs/t2t_vit_14.py')
  if not Path(file).is_file():
    fail(f'there is no config file {file}' + (f': did you mean {file}.py?' if Path(f'{file}.py').is_file() else ''))


def check_and_quiet(argv: list[str]) -> None:
  """Ends the program if an argument has no flag or a flag no value, and silences libraries; for the start of `main`."""
  start_program()
  if len(argv) > 1:
    fail(f'arguments without a flag: {" ".join(argv[1:])}')
  for name in flags.FLAGS:
    value = flags.FLAGS[name].value
    if isinstance(value, str) and value.startswith('--'):  # absl takes what comes next
      fail(f'--{name} has no value: after it comes {value}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax logs each of its files at INFO, tfds each folder


def config_file(argv: list[str]) -> str | None:
  """The file of `--config=FILE` or `--config FILE`, without an argument for the config; None if there is none."""
  values = re.findall(r'^--?config[=\n](.*)$', '\n'.join(argv), re.MULTILINE)
  return values[-1].split(':')[0] if values else None


def _refuse_unknown_field(argv: list[str], config_file: str | None) -> None:
  """Ends the program if an override names a field that the config lacks."""
  tree = runpy.run_path(str(config_file))['get_config']()
  groups = [name for name in tree if isinstance(tree[name], type(tree))]
  known = [f'{group}.{field}' for group in groups for field in tree[group]] + [x for x in tree if x not in groups]
  for match in filter(None, (re.match(r'--?(?:no)?config\.([^=]+)', argument) for argument in argv)):
    if (path := match[1]) not in known:
      fail(f'unknown config field {path!r}: {did_you_mean(path, known)}')


def fail(message: str) -> NoReturn:
  """Ends the program with a line on standard error and exit code 2."""
  print_error(message)
  sys.exit(2)


def print_error(error: object) -> None:
  """Prints a line on standard error, whatever names the message contains."""
  print_message(f'error: {error}')


def print_message(message: object) -> None:
  """Prints a line on standard error, unless that is gone."""
  with contextlib.suppress(OSError):
    print(printable(str(message)), file=sys.stderr, flush=True)
