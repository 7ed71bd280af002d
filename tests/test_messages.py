"""Advice that can be followed: a tool has each flag, and a config each field, that its messages name."""

import ast
import functools
from pathlib import Path
import re

import pytest

import configs.default
from t2t_vit_jax.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 't2t_vit_jax'
TRAIN, CONVERT, PREPARE = PACKAGE / 'train.py', PACKAGE / 'conversion' / '__main__.py', PACKAGE / 'prepare.py'
SHRINK = PACKAGE / 'shrink.py'
EVALUATE = PACKAGE / 'evaluate' / '__main__.py'
TOOLS = [PACKAGE / f'{name}.py' for name in ('export', 'plan', 'predict', 'visualize', 'weights')]
# The tools whose users see what a part of the package says, where that part is no tool itself. `load_as_configured` and
# `load_pretrained` put their own names in place of the converter's flags.
SHOWN_BY = {
  'conversion/files.py': [CONVERT, EVALUATE, *(tool for tool in TOOLS if tool.stem not in ('plan', 'weights'))],
  'conversion': [CONVERT],
  'evaluate': [EVALUATE],
  'data/preparation.py': [PREPARE],
  'data/sources.py': [PREPARE],  # in the commands that it names
  '': [TRAIN],
}
FLAG = re.compile(r'(?<![\w-])--([a-z][a-z_]*(?:-[a-z]+)*(?:\.[a-z0-9_]+)*)')
COMMAND = re.compile(r't2t-vit (' + '|'.join(COMMANDS) + ')')
NOT_OURS = {
  'implicit-dirs',
  'always',
  'version',
  'dirty',
  'abbrev',
  'exclude',
  'flag',
  'shm-size',
}  # gcsfuse's, git's, any, docker's


def names_of_calls(node):
  return getattr(node.func, 'attr', getattr(node.func, 'id', ''))


@functools.cache
def flags_of(tool):
  """The flags that a tool defines, with both spellings of a hyphen."""
  calls = [node for node in ast.walk(ast.parse(tool.read_text())) if isinstance(node, ast.Call)]
  flags = {'help'}
  for call in calls:
    if names_of_calls(call) == 'add_argument':
      flags |= {argument.value.lstrip('-') for argument in call.args if isinstance(argument, ast.Constant)}
    elif names_of_calls(call).startswith('DEFINE_'):
      flags.add(call.args[0].value)
  if 'ConfigParser(' in tool.read_text():
    flags |= {'config'}
  if 'add_process_flags(' in tool.read_text():
    flags |= {'coordinator', 'num_processes', 'process_id'}
  return flags | {flag.replace('_', '-') for flag in flags}


def messages(path):
  """(line, text) of each string in a file, those in braces left out of f-strings; but not of definitions of flags."""
  skipped = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if node in skipped:
      continue
    if isinstance(node, ast.Call) and names_of_calls(node) in ('add_argument', 'replace', 'sub'):
      skipped |= {constant for argument in node.args for constant in ast.walk(argument)}
    elif isinstance(node, ast.JoinedStr):
      skipped |= set(ast.walk(node))
      yield node.lineno, ''.join(part.value if isinstance(part, ast.Constant) else '{}' for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.lineno, node.value


def tools_of(path, text):
  if command := COMMAND.search(text):
    return [ROOT / (COMMANDS[command[1]].module.replace('.', '/') + '.py')]
  if 'python train.py' in text:
    return [TRAIN]
  if path in (TRAIN, CONVERT, PREPARE, SHRINK, EVALUATE, *TOOLS):
    return [path]
  inside = path.relative_to(PACKAGE).as_posix()
  return next(tools for prefix, tools in SHOWN_BY.items() if inside.startswith(prefix))


def is_field(path):
  tree = configs.default.get_config()
  for name in path.split('.'):
    if name not in tree:
      return False
    tree = tree[name]
  return True


@pytest.mark.parametrize('path', [TRAIN, *sorted(PACKAGE.rglob('*.py'))], ids=lambda path: path.stem)
def test_flags_in_messages_exist(path):
  for line, text in messages(path):
    for flag in set(FLAG.findall(text)) - NOT_OURS:
      if flag.startswith('config.'):
        assert is_field(flag.removeprefix('config.')), f'{path}:{line} names the field {flag}'
      else:
        for tool in tools_of(path, text):
          assert flag in flags_of(tool), f'{path}:{line} names --{flag}, which {tool.name} lacks'


def test_flags_are_found_in_messages_and_in_tools():
  """The test above would pass if it found none."""
  assert {'model', 'set', 'weights', 'reverse', 'force'} <= flags_of(CONVERT)
  assert {'workdir', 'evaluate', 'config', 'coordinator'} <= flags_of(TRAIN)
  found = {flag for path in PACKAGE.rglob('*.py') for _, text in messages(path) for flag in FLAG.findall(text)}
  assert {'model', 'force', 'config.data.eval_split', 'coordinator', 'manual-dir'} <= found
  assert not is_field('data.nothing')
