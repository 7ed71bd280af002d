"""Command lines: an error is one line and exit code 2. `config_files.py` adds the flags of a config."""

import argparse
from collections.abc import Callable, Sequence
import contextlib
import errno
import glob
import io
import logging as python_logging
import os
from pathlib import Path
import re
import sys
from typing import Any, NoReturn

from absl import logging

from t2t_vit_jax.errors import UserError, did_you_mean, printable, show_warnings_as_lines
from t2t_vit_jax.interrupts import OWN_PROGRAM, end_if_unheard, imports_are_done

# Files that show that there is a TPU or an NVIDIA GPU: those that JAX and libtpu look for, and Windows's for Linux.
TPU_DEVICES = ('/dev/accel*', '/dev/vfio/[0-9]*')
NVIDIA_DEVICES = ('/dev/nvidia0', '/dev/nvidiactl', '/dev/dxg')
GOOGLE_PCI_VENDOR = '0x1ae0'


class Parser(argparse.ArgumentParser):
  """Parser of a command: raises UserError for wrong arguments, and takes no abbreviations of flags.

  Args:
    command: name of the command in `t2t-vit COMMAND`.
    example: one or more lines, with which --help begins.
    options: of `argparse.ArgumentParser`.
  """

  def __init__(self, command: str, *, example: str, **options: Any):
    super().__init__(**{'prog': f't2t-vit {command}', **options}, allow_abbrev=False)
    self.example = example

  def format_help(self) -> str:
    """The help: an example, a short usage, what the command does, its arguments."""
    words = [self.prog]
    for action in self._actions:
      if not action.option_strings:
        shape = f'{action.metavar} ...' if action.nargs in ('+', '*') else str(action.metavar)
        words.append(f'[{shape}]' if action.nargs in ('*', '?') else shape)
      elif action.required:
        words.append(f'{action.option_strings[0]}={action.metavar}')
    self.usage = ' '.join([*words, '[options]'])
    example = ''.join(f'  {line}\n' for line in self.example.splitlines())
    return f'For example:\n{example}\n{super().format_help()}'

  def parse_args(self, argv: Any = None, namespace: Any = None) -> Any:
    """Parses `argv`, or the program's own; see `with_home`. Flags may have hyphens in place of underscores."""
    argv = with_flag_names(with_home(sys.argv[1:] if argv is None else argv))
    arguments, unknown = super().parse_known_args(argv, namespace)
    for argument in unknown:
      if argument.startswith('--'):
        flag = argument.split('=')[0]
        raise UserError(f'unknown flag {flag}: {self.unknown_flag(flag)}')
    if unknown:
      raise UserError(f'arguments without a flag: {" ".join(unknown)}{self.advice_without_flag(unknown[0])}')
    return arguments

  def unknown_flag(self, flag: str) -> str:
    """Advice for a flag that the command lacks."""
    return did_you_mean(flag, self._option_string_actions)

  def advice_without_flag(self, argument: str) -> str:
    """Advice for an argument that lacks a flag, as the end of a line; empty if there is none."""
    del argument
    return ''

  def error(self, message: str) -> NoReturn:
    raise UserError(message.replace('ignored explicit argument', 'takes no value, not'))


def start_program() -> None:
  """Prepares this process for a command; nothing of this is done to programs that import the package as a library.

  Ctrl-C cleans up from now on, warnings are shown as lines, libraries log warnings only, streams that are closed become
  the null device, and what accelerators' libraries print where there is no accelerator is left out.
  """
  imports_are_done()
  show_warnings_as_lines()
  logging.set_verbosity(logging.WARNING)  # orbax logs each of its files at INFO, tfds each folder
  leave_out_missing_accelerators()
  for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open to the end)


def with_home(argv: Sequence[str]) -> list[str]:
  """Replaces ~ at the start of arguments and of flags' values by the home folder, which shells do not in --flag=~/x."""
  return [re.sub(r'^(-[^=]*=)?~(?=/|$)', lambda match: (match[1] or '') + os.path.expanduser('~'), x) for x in argv]


def leave_out_missing_accelerators() -> None:
  """Keeps libtpu and CUDA's plugin from printing errors on a machine without a TPU or GPU; JAX need not be imported.

  JAX tries all that is installed, so libtpu asks what kind of TPU this is, and CUDA's plugin looks for its libraries.
  Whoever asks for them by JAX_PLATFORMS sees their errors.
  """
  wanted = os.environ.get('JAX_PLATFORMS', '')
  if 'tpu' not in wanted and not has_tpu():
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-1')  # answers, so that it need not ask
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  if not {'cuda', 'gpu'} & set(wanted.split(',')) and not any(map(os.path.exists, NVIDIA_DEVICES)):
    python_logging.getLogger('jax._src.xla_bridge').addFilter(_is_no_plugin_error)


def has_tpu() -> bool:
  """Whether this machine shows any sign of a TPU: a device file, or a PCI device of Google's."""
  if any(map(glob.glob, TPU_DEVICES)) or 'JAX_FORCE_TPU_INIT' in os.environ:
    return True
  vendors = map(Path, glob.glob('/sys/bus/pci/devices/*/vendor'))
  return any(vendor.read_text().strip() == GOOGLE_PCI_VENDOR for vendor in vendors)


def _is_no_plugin_error(record: python_logging.LogRecord) -> bool:
  """Whether a line of JAX's log is about something else than a plugin that does not work."""
  return not str(record.msg).startswith('Jax plugin configuration error')


def with_flag_names(argv: Sequence[str]) -> list[str]:
  """Replaces the hyphens in the names of flags by underscores, up to an argument `--`: after it come names."""
  end = argv.index('--') if '--' in argv else len(argv)
  return [*map(_with_underscores, argv[:end]), *argv[end:]]


def _with_underscores(argument: str) -> str:
  """A flag with underscores in its name in place of hyphens; any other argument as it is."""
  name, equals, value = argument.partition('=')
  return f'--{name[2:].replace("-", "_")}{equals}{value}' if name.startswith('--') else argument


def add_process_flags(parser: Parser) -> None:
  """Adds the flags of a command that may run in several processes, for `processes.start`."""
  parser.add_argument(
    '--coordinator', metavar='HOST:PORT', help='address of process 0, if JAX does not find the processes by itself'
  )
  parser.add_argument(
    '--num_processes', metavar='N', type=int, help='number of processes, with --coordinator; 1: do not look for others'
  )
  parser.add_argument(
    '--process_id', metavar='N', type=int, help='number of this process, from 0 on, with --coordinator'
  )


def positive(text: str) -> int:
  """Type of a flag: a whole number from 1 on."""
  return whole_number(text, least=1)


def whole_number(text: str, least: int) -> int:
  """Parses a whole number from `least` on; raises argparse's error for anything else."""
  try:
    number = int(text)
  except ValueError:
    number = least - 1
  if number < least:
    raise argparse.ArgumentTypeError(f'must be a whole number from {least} on, not {text!r}')
  return number


def run_tool(tool: Callable[[], int]) -> int:
  """Runs the `main` of a tool with such a parser and returns its exit code: 2 after a line about the user's error."""
  start_program()

  def end(code: int) -> int:
    """Ends the program as it is, if it uses JAX: Python would free memory that JAX may still write to, and crash."""
    if OWN_PROGRAM and 'jax' in sys.modules:
      from t2t_vit_jax.processes import leave  # late: it imports jax

      leave(code)
    return code

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
