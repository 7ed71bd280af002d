"""Prints lines for the user, and leaves a progress line intact. What is only shown never ends a run.

Whatever names a line contains, it stays one line, and no part of it is a command to the terminal.
"""

import contextlib
import os
import sys
from typing import TextIO

import jax
from tqdm import tqdm

from t2t_vit_jax.errors import printable


def say(text: str) -> None:
  """Prints a line to standard output, in the first process only."""
  if jax.process_index() == 0:
    _print(text, sys.stdout)


def note(text: str) -> None:
  """Prints a line to standard error, in every process: what a program is busy with."""
  _print(text, sys.stderr)


def warn(text: str) -> None:
  """Prints a line to standard error, in every process."""
  note(f'warning: {text}')


def _print(text: str, stream: TextIO | None) -> None:
  """Prints a line, with escapes for letters that the terminal lacks. A stream that fails is given up with a warning."""
  if stream is None:  # closed before the program started
    return
  try:
    encoding = stream.encoding or 'utf-8'
    tqdm.write(printable(text).encode(encoding, 'backslashreplace').decode(encoding), file=stream)
    stream.flush()  # a log file should show it now
  except OSError as error:  # a reader such as `head` is gone, or a disk is full
    with contextlib.suppress(OSError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python would fail again when it ends
    if stream is sys.stdout:
      warn(f'standard output cannot be written ({error.strerror}); the program goes on without it')
