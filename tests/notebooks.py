"""Renews the notebooks in docs/notebooks, with their outputs: python -m tests.notebooks [NAME ...]

A notebook is written as NAME.py in jupytext's percent format. NAME.ipynb is that, executed.
"""

from pathlib import Path
import sys
import tempfile

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / 'docs' / 'notebooks'


def read_source(name):
  """The notebook of NAME.py, without outputs."""
  import jupytext

  notebook = jupytext.read(FOLDER / f'{name}.py')
  # Neither versions nor random ids: what is stored changes only with the source and the results.
  notebook.metadata = {'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}}
  for number, cell in enumerate(notebook.cells):
    cell.id = f'cell-{number}'
  return notebook


def execute(notebook):
  """Runs a notebook in place, in a folder that looks like a checkout without runs."""
  import nbclient

  with tempfile.TemporaryDirectory() as folder:
    for name in ('train.py', 'configs', 't2t_vit_jax'):
      (Path(folder) / name).symlink_to(ROOT / name)
    path = Path(folder) / 'docs' / 'notebooks'
    path.mkdir(parents=True)
    options = dict(timeout=600, coalesce_streams=True, resources={'metadata': {'path': str(path)}})
    nbclient.NotebookClient(notebook, **options).execute()
  for cell in notebook.cells:
    cell.metadata.pop('execution', None)  # times


def main(names):
  import nbformat

  for name in names or sorted(path.stem for path in FOLDER.glob('*.py')):
    notebook = read_source(name)
    execute(notebook)
    nbformat.write(notebook, FOLDER / f'{name}.ipynb')
    print(f'wrote {name}.ipynb')


if __name__ == '__main__':
  main(sys.argv[1:])
