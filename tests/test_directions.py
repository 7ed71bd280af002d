"""Imports within the package go one way: from what a run needs down to the models and the data."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / 't2t_vit_jax'
# Room -> what it may import, besides itself.
MAY_IMPORT = {
  '__init__': {'interrupts', 'errors', 'models', 'conversion'},
  'interrupts': set(),
  'errors': set(),
  'console': {'errors'},
  'command_line': {'errors', 'interrupts', 'processes'},
  'processes': {'errors'},
  'models': {'errors'},
  'data': {'errors'},
  'conversion': {'errors', 'console', 'models'},
  'planning': {'errors'},
}
MAY_IMPORT['recipe'] = {'errors', 'models', 'data', 'conversion', 'processes'}
MAY_IMPORT['workdir'] = {'recipe', 'console'} | MAY_IMPORT['recipe']
MAY_IMPORT['training'] = {'workdir', 'planning', 'interrupts'} | MAY_IMPORT['workdir']
TOOLS = {
  'evaluate',
  'predict',
  'visualize',
  'export',
  'plan',
  'prepare',
  'shrink',
  'train',
  'config_files',
  '__main__',
  'weights',
}  # for `python -m`, as is `conversion/__main__.py`: all of the above
FORBIDDEN = {'data': {'jax', 'flax', 'optax'}, 'models': {'tensorflow_datasets', 'grain', 'orbax'}}
FORBIDDEN['recipe'] = {'orbax', 'tqdm'}  # it writes no file and prints no line


def imported(file):
  """The names of all modules that a file imports, at any depth."""
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{file} has a relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def room_of(file):
  return file.relative_to(PACKAGE).parts[0].removesuffix('.py')


def test_imports_go_downwards():
  rooms = set()
  for file in PACKAGE.rglob('*.py'):
    room, names = room_of(file), [name.split('.') for name in imported(file)]
    rooms.add(room)
    own = {name[1] for name in names if name[0] == 't2t_vit_jax' and len(name) > 1} - {'__version__', room}
    others = {name[0] for name in names}
    assert not others & {'configs', 'train', 'convert_torch_weights', 'tests', 'benchmarks'}, file
    assert not others & FORBIDDEN.get(room, set()), file
    if room not in TOOLS and file.name != '__main__.py':
      assert own <= MAY_IMPORT[room], file
  assert rooms == MAY_IMPORT.keys() | TOOLS
