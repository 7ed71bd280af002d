"""Prints what the tests assert: a line for each behaviour, the test that shows it, and how many of its cases are fast.

`python -m tests.behaviours`
"""

from collections import Counter
import contextlib
import io

import pytest


class Collected:
  """A plugin that keeps the tests that pytest finds."""

  items: list[pytest.Item] = []

  def pytest_collection_finish(self, session: pytest.Session) -> None:
    self.items = session.items


def main() -> None:
  collected = Collected()
  with contextlib.redirect_stdout(io.StringIO()):
    pytest.main(['--all', '--collect-only', '-n', '0', '-q'], plugins=[collected])
  every, fast = Counter(), Counter()
  for item in collected.items:
    test = item.nodeid.split('[')[0]
    every[test] += 1
    fast[test] += item.get_closest_marker('slow') is None
  print('| behaviour | test | fast cases of all |\n|---|---|---|')
  for test, count in every.items():
    behaviour = test.split('::')[-1].removeprefix('test_').replace('_', ' ')
    print(f'| {behaviour} | `{test}` | {fast[test]} of {count} |')
  print(f'\n{sum(fast.values())} fast cases of {sum(every.values())}, {len(every)} behaviours')


if __name__ == '__main__':
  main()
