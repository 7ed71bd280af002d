"""Runs survive full disks, closed pipes and terminals that lack letters, in all that they only show or log."""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys

from etils import epath
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from t2t_vit_jax import UserError, console
from t2t_vit_jax.recipe.evaluation import Accuracy
from t2t_vit_jax.workdir.folder import Workdir, open_workdir
from t2t_vit_jax.workdir.metrics import Reporter
from t2t_vit_jax.workdir.report_page import write_report
from tests.processes import ROOT
from tests.small_disk import fill, small_disk

STEP = {'loss': jnp.float32(2.0), 'gradient_norm': jnp.float32(1.0), 'learning_rate': jnp.float32(0.1), 'applied': True}
ACCURACY = Accuracy(3, 4, 5, 1.0, class_correct=(3,), class_count=(5,), class_names=('cat',))


def test_without_matplotlib_one_line_takes_the_place_of_the_page(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  with reporter(tmp_path) as run:
    report(run, 1)
    run.page(np.zeros((2, 4, 4, 3), np.uint8), 'title')
  output, errors = capsys.readouterr()
  assert re.search(
    r"^no report\.png: drawing its curves needs matplotlib: pip install .*\[plots\]'$", output, re.MULTILINE
  ), output
  assert not errors
  assert not (tmp_path / 'report.png').exists()


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


def reporter(folder):
  return Reporter(Workdir(epath.Path(folder), folder), total_steps=9, first_step=0, steps_per_epoch=1, batch_size=1)


def report(of, step):
  of.collect(STEP)
  of.report(step)


def test_a_full_disk_keeps_the_table_and_pictures_that_were_there(tmp_path, capsys):
  images = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)
  files = ('per_class.csv', 'report.png', 'augmented_images.png')
  with small_disk(tmp_path), reporter(tmp_path) as run:
    report(run, 1)
    for name in files:
      (tmp_path / name).write_text('before')
    fill(tmp_path, 0)
    run.classes(ACCURACY, show=False)
    run.page(images, 'title')
    run.images(images)
    report(run, 2)
    assert [(tmp_path / name).read_text() for name in files] == ['before'] * 3
    assert not list(tmp_path.glob('.*'))
  reason = 'the disk is full: more is needed than the 0 bytes that are free'
  assert capsys.readouterr().err.splitlines() == [
    f'warning: {tmp_path}/{name} could not be written ({reason}); the run goes on without' for name in files
  ]


def test_a_workdir_that_is_deleted_is_said_once_and_what_comes_then_is_written(tmp_path, capsys):
  folder = tmp_path / 'run'
  folder.mkdir()
  with reporter(folder) as run:
    report(run, 1)
    shutil.rmtree(folder)
    report(run, 2)
    folder.mkdir()  # as the next checkpoint does
    report(run, 3)
    report(run, 4)
  assert [json.loads(row)['step'] for row in (folder / 'metrics.jsonl').read_text().splitlines()] == [3, 4]
  first, second = capsys.readouterr().err.splitlines()
  assert f'{folder}/metrics.jsonl could not be written (No such file or directory)' in first
  assert f'{folder}/metrics.jsonl was deleted while the run wrote it: its earlier rows are lost' in second


def test_tensorboard_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
  (tmp_path / 'tensorboard').write_text('in the way')
  with reporter(tmp_path) as run:
    report(run, 1)
  assert json.loads((tmp_path / 'metrics.jsonl').read_text())['step'] == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'warning: {tmp_path}/tensorboard could not be written (File exists)')


def test_a_workdir_without_room_for_its_lock_is_refused_in_one_line(tmp_path):
  with small_disk(tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    fill(tmp_path, 0)
    with (
      pytest.raises(
        UserError, match=r'cannot write to workdir .*full: at least \d+ bytes are needed, 0 bytes are free'
      ),
      open_workdir(tmp_path),
    ):
      pass


BROKEN_ROWS = (
  b'{"step": 2, "kind": "tr', b'\xff\xfe', b'[1]', b'null', b'[' * 100_000, b'{"step": 2}', b'{"kind": "train"}',
  b'{"step": "2", "kind": "train"}', b'{"step": NaN, "kind": "train"}', b'{"step": 2, "kind": ["train"]}',
  b'{"step": 1e999, "kind": "train"}', b'{"step": 2, "kind": "val", "weights": 7}',
)  # fmt: skip
ODD_ROWS = (  # they are rows, and what they hold is not drawn, or not as a formula
  b'{"step": 2, "kind": "train"}', b'{"step": 2, "kind": "train", "loss": "low", "learning_rate": null}',
  b'{"step": 2, "kind": "train", "loss": 1e300, "learning_rate": -Infinity}', b'{"step": 2, "kind": "", "weights": ""}',
  b'{"step": 2, "kind": "train", "loss": ' + b'9' * 400 + b', "learning_rate": NaN}',
  b'{"step": 2, "kind": "$x^$", "weights": "raw", "loss": [1], "top1": 0.5}',
  b'{"step": 2, "kind": "\\u001b[2J\xff", "weights": "$\\\\frac$"}',
)  # fmt: skip


def test_lines_that_are_no_rows_are_dropped_and_said(tmp_path, capsys):
  file, last = tmp_path / 'metrics.jsonl', b'{"step": 9, "kind": "train"}'
  file.write_bytes(b'\n'.join([*BROKEN_ROWS, *ODD_ROWS, last, BROKEN_ROWS[0]]))
  with Reporter(Workdir(epath.Path(tmp_path), tmp_path), total_steps=9, first_step=2, steps_per_epoch=1, batch_size=1):
    pass
  assert file.read_bytes() == b''.join(row + b'\n' for row in ODD_ROWS)
  assert capsys.readouterr().err == (
    f'warning: {file}: dropped {1 + len(BROKEN_ROWS)} lines without a row of metrics, such as the last one of a '
    'killed process\n'
  )


def test_a_page_is_drawn_whatever_the_rows_hold(tmp_path):
  (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join((*BROKEN_ROWS, *ODD_ROWS)))
  page = write_report(tmp_path, np.zeros((2, 4, 4, 3), np.uint8), 'a $x^$ \x1b[2J')
  with Image.open(page) as image:
    assert image.size == (1200, 800)


@pytest.mark.parametrize('name', ['metrics.jsonl', 'lock'])
def test_a_pipe_in_a_workdir_keeps_no_run_waiting(tmp_path, name):
  os.mkfifo(tmp_path / name)
  with pytest.raises(UserError, match=f'{name} is no regular file: delete it'), open_workdir(tmp_path):
    pass


def test_a_lock_is_shown_whatever_it_holds(tmp_path):
  with open_workdir(tmp_path):
    (tmp_path / 'lock').write_bytes(b'\xff\x1b[2J' + 999 * b'x')
    with pytest.raises(UserError, match='is used by another run') as error, open_workdir(tmp_path):
      pass
  assert len(str(error.value)) < 500


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
