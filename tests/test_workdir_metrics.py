"""Runs survive full disks, closed pipes and terminals that lack letters, in all that they only show or log."""

import io
import json
import os
import resource
import subprocess
import sys

from etils import epath
import jax.numpy as jnp
import pytest

from t2t_vit_jax import console
from t2t_vit_jax.recipe.evaluation import Accuracy
from t2t_vit_jax.workdir.folder import Workdir
from t2t_vit_jax.workdir.metrics import Reporter
from tests.processes import ROOT

STEP = {'loss': jnp.float32(2.0), 'gradient_norm': jnp.float32(1.0), 'learning_rate': jnp.float32(0.1), 'applied': True}
ACCURACY = Accuracy(3, 4, 5, 1.0, class_correct=(3,), class_count=(5,), class_names=('cat',))


def test_a_full_disk_costs_rows_but_not_the_run(tmp_path, capsys):
  workdir, limits = Workdir(epath.Path(tmp_path), tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
  with Reporter(workdir, total_steps=9, first_step=0, steps_per_epoch=1, batch_size=1) as reporter:

    def report(step):
      reporter.collect(STEP)
      reporter.report(step)

    report(1)
    size = (tmp_path / 'metrics.jsonl').stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))  # bytes: files grow no further
    try:
      for step in (2, 3):
        report(step)
      reporter.evaluation(3, 'val', {'raw': ACCURACY})
      reporter.classes(ACCURACY, show=False)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    report(4)
  rows = [json.loads(row) for row in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == [1, 4]
  warnings = capsys.readouterr().err.splitlines()
  assert len(warnings) == 2
  for warning, name in zip(warnings, ('metrics.jsonl', 'tensorboard'), strict=True):
    assert warning.startswith(f'warning: {tmp_path}/{name} could not be written (')


def test_a_workdir_that_became_read_only_gets_one_line(tmp_path):
  (tmp_path / 'tensorboard').write_text('in the way')
  with pytest.raises(Exception, match='cannot write to workdir') as error:
    Reporter(Workdir(epath.Path(tmp_path), tmp_path), total_steps=9, first_step=0, steps_per_epoch=1, batch_size=1)
  assert type(error.value).__name__ == 'UserError'


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
def test_letters_that_a_terminal_lacks_are_escaped(encoding, monkeypatch):
  for name, write in (('stdout', console.say), ('stderr', console.warn)):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, name, stream)
    write('Käse, 犬')
    text = stream.buffer.getvalue().decode(encoding)
    expected = {'ascii': 'K\\xe4se, \\u72ac', 'latin-1': 'Käse, \\u72ac', 'utf-8': 'Käse, 犬'}[encoding]
    assert text == ('warning: ' if name == 'stderr' else '') + expected + '\n'


def test_a_closed_pipe_does_not_end_the_program():
  program = (
    'from t2t_vit_jax.console import say\nfor i in range(3): say(str(i))\nprint("done", file=__import__("sys").stderr)'
  )
  reader, writer = os.pipe()
  os.close(reader)
  done = subprocess.run(
    [sys.executable, '-c', program], stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
  )  # fmt: skip
  os.close(writer)
  assert done.returncode == 0
  assert done.stderr.splitlines() == [
    'warning: standard output cannot be written (Broken pipe); the program goes on without it',
    'done',
  ]
