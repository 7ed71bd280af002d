"""Writes docs/commands.md, the help of every command: python -m docs.command_help."""

import contextlib
import importlib
import io
import os
from pathlib import Path

from t2t_vit_jax.__main__ import COMMANDS, overview

PAGE = Path(__file__).parent / 'commands.md'
HEAD = """# Commands

<!-- Written by `python -m docs.command_help`. -->

`t2t-vit COMMAND` and `python -m t2t_vit_jax COMMAND` are the same. Flags may be written with hyphens or underscores, as
`--flag=VALUE` or `--flag VALUE`. An error is one line on standard error, and exit code 2.

```text
{overview}
```
"""
SECTION = """
## {name}

```text
{help}
```
"""


def help_of(module: str) -> str:
  """Text that the command of a module prints for --help, 100 columns wide."""
  output = io.StringIO()
  os.environ['COLUMNS'] = '90'  # argparse leaves two free
  with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
    importlib.import_module(module).main(['--help'])
  return output.getvalue().strip()


def render() -> str:
  """Text of the page."""
  sections = [SECTION.format(name=name, help=help_of(command.module)) for name, command in COMMANDS.items()]
  return ''.join([HEAD.format(overview=overview()), *sections])


if __name__ == '__main__':
  PAGE.write_text(render(), 'utf-8')
