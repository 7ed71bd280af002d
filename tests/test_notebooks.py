"""The notebooks in docs/notebooks run, and find what is stored in them."""

import json
import re

import pytest

from tests import notebooks

ACCURACY = re.compile(r'test top-1 [\d.]+ % \((\d+)/(\d+)\)')
# Lowest top-1, of test images: a guess at random has 0.2 in both.
LEAST_ACCURACY = {'look_inside': 0.95, 'own_folder': 0.85}
NAMES = sorted(path.stem for path in notebooks.FOLDER.glob('*.py'))


def stored(name):
  return json.loads((notebooks.FOLDER / f'{name}.ipynb').read_text())['cells']


def text_of(cell):
  """Text that a cell printed; in files it is a list of lines."""
  return ''.join(''.join(output['text']) for output in cell.get('outputs', []) if output['output_type'] == 'stream')


def accuracy(cells):
  (match,) = ACCURACY.finditer('\n'.join(map(text_of, cells)))
  return int(match[1]) / int(match[2])


@pytest.mark.needs('jupytext')
@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_is_what_its_source_says(name):
  """An edit of one of the two files alone is noticed: `python -m tests.notebooks` renews the notebook."""
  cells = notebooks.read_source(name).cells
  assert [''.join(cell['source']) for cell in stored(name)] == [cell.source for cell in cells]
  assert all(cell['outputs'] or 'import' in ''.join(cell['source']) or '%cd' in ''.join(cell['source'])
             for cell in stored(name) if cell['cell_type'] == 'code')  # fmt: skip
  assert accuracy(stored(name)) >= LEAST_ACCURACY[name]


@pytest.mark.slow
@pytest.mark.needs('nbclient')
@pytest.mark.needs('jupytext')
@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_runs(name, monkeypatch):
  """Each cell succeeds, the model has learned, and what cannot vary is what is stored."""
  monkeypatch.delenv('XLA_FLAGS')  # XLA's own: they compile slower and compute faster, as for users
  notebook = notebooks.read_source(name)
  notebooks.execute(notebook)
  assert accuracy(notebook.cells) >= LEAST_ACCURACY[name]
  exact = [i for i, cell in enumerate(notebook.cells) if 'exact' in cell.metadata.get('tags', [])]
  assert exact
  for i in exact:
    assert text_of(notebook.cells[i]) == text_of(stored(name)[i]) != ''
  for new, old in zip(notebook.cells, stored(name), strict=True):
    kinds = [[output['output_type'] for output in cell.get('outputs', [])] for cell in (new, old)]
    assert kinds[0] == kinds[1], new['source']  # as many pictures, and no new warnings
