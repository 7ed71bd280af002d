"""The error for input that the user can correct, and names that are looked up in a table."""

from collections.abc import Iterable, Mapping
import difflib
from typing import TypeVar

Row = TypeVar('Row')


class UserError(ValueError):
  """Input that the user can correct: scripts print it as one line and exit with code 2."""


class DataError(UserError):
  """Data that failed while a run was reading it: what the run has done so far is good."""


def printable(text: str) -> str:
  """`text` on one line of a terminal, whatever names it contains: other characters as Python writes them."""
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns `name`'s nearest relatives among `known` as a phrase, or all of `known` if none is near."""
  known = sorted(set(known))
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
  if near:
    return f'did you mean {" or ".join(map(repr, near))}?'
  return f'known names: {", ".join(known)}'


def choose(table: Mapping[str, Row], field: str, name: str) -> Row:
  """The row of `table` that `name`, the value of a config's `field`, names.

  Raises:
    UserError: there is none.
  """
  if name not in table:
    raise UserError(f'{field} must be {" or ".join(map(repr, table))}, not {name!r}')
  return table[name]
