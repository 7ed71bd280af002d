"""Cases of a test, of which every day sees a few."""

import pytest


def slow(*values):
  """A case of `pytest.mark.parametrize` that is slow."""
  return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(fast, cases):
  """The `cases` of `pytest.mark.parametrize`, all of them slow but those in `fast`."""
  cases = list(cases)
  assert all(case in cases for case in fast)
  return [case if case in fast else slow(*(case if isinstance(case, tuple) else (case,))) for case in cases]
