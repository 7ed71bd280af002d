"""Prints lines for the user, and leaves a progress line intact."""

import sys

import jax
from tqdm import tqdm


def say(text: str) -> None:
  """Prints a line to standard output, in the first process only."""
  if jax.process_index() == 0:
    tqdm.write(text)
    sys.stdout.flush()  # a log file should show it now


def warn(text: str) -> None:
  """Prints a line to standard error, in every process."""
  tqdm.write(f'warning: {text}', file=sys.stderr)
