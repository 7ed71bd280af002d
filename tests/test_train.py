"""`train.py` as a user runs it: in a process of its own."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.image_folder import write_image_folder
from tests.imagenet_tars import write_imagenet_tars
from tests.processes import ROOT, data_workers, start_process

TINY = ['--config.model.depth=1', '--config.model.embed_dim=32', '--config.model.tokens_type=convolution']


def environment():
  return {**os.environ, 'JAX_PLATFORMS': 'cpu'}


def start(cwd, *arguments, **environment):
  return start_process(*arguments, cwd=cwd, **environment)


def run(cwd, *arguments, **environment):
  process = start(cwd, *arguments, **environment)
  output, errors = process.communicate(timeout=600)
  return process.returncode, output, errors


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--workdr=x'], "unknown flag --workdr: did you mean '--workdir'"),
    (['--config.optimizer.beta=1'], "unknown config field 'optimizer.beta': did you mean 'optimizer.beta2'"),
    (['--config.optimzer.beta1=1'], "unknown config field 'optimzer.beta1': did you mean 'optimizer.beta1'"),
    (['--config=configs/nothing.py'], 'there is no config file configs/nothing.py'),
    (['--config.data.batch_size=many'], 'invalid literal'),
    (['digits'], 'arguments without a flag: digits; did you mean --config=digits?'),
    (['--workdir', '--dry_run'], 'argument --workdir: expected one argument'),
    (['--config.data.path', '--json'], 'Missing value for flag --config.data.path'),
    (['--config.model.name=t2t_vit_tinny'], "did you mean 't2t_vit_tiny'"),
    (['--workdir=file:///runs'], 'workdir file:///runs: give a folder, or a bucket as gs://BUCKET/RUN'),
  ],
)
def test_bad_command_lines_get_one_line_and_exit_code_2(tmp_path, arguments, message):
  code, output, errors = run(tmp_path, *arguments)
  assert code == 2
  assert output == ''
  assert errors.count('\n') == 1
  assert errors.startswith('error: ')
  assert message in errors
  assert list(tmp_path.iterdir()) == []


def test_devices_that_are_not_there_get_one_line(tmp_path):
  code, _, errors = run(tmp_path, JAX_PLATFORMS='cuda')
  assert code == 2
  assert errors.splitlines()[-1].startswith('error: JAX finds no devices with JAX_PLATFORMS=cuda (')
  assert 'Traceback' not in errors


def test_the_imagenet_config_says_how_to_prepare_the_data(tmp_path):
  arguments = [f'--config={ROOT}/configs/t2t_vit_14.py', f'--config.data.data_dir={tmp_path}/data']
  code, _, errors = run(tmp_path, *arguments)
  assert code == 2
  assert errors.count('\n') == 1
  assert 'imagenet2012 is not prepared' in errors
  assert f't2t-vit prepare imagenet2012 --manual-dir FOLDER_OF_THE_TARS --data-dir {tmp_path}' in errors


def hang_up(cwd, *arguments):
  """Trains in a terminal of its own, which is closed when its bar has moved: SIGHUP, and nowhere to print to."""
  ours, terminal = pty.openpty()
  termios.tcsetwinsize(ours, (24, 100))
  take_terminal = (
    'import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); '
    'os.execv(sys.executable, [sys.executable, *sys.argv[1:]])'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', take_terminal, ROOT / 'train.py', *arguments],
    **dict.fromkeys(('stdin', 'stdout', 'stderr'), terminal),
    cwd=cwd,
    env=environment(),
    start_new_session=True,
  )
  os.close(terminal)
  shown = b''
  while len(set(re.findall(rb'(\d+)/40', shown))) < 2:
    shown += os.read(ours, 4096)
  os.close(ours)
  assert process.wait(timeout=120) == 128 + signal.SIGHUP


@pytest.mark.slow
def test_an_interrupted_run_continues_and_ends_like_an_undisturbed_one(tmp_path, data_dir):
  arguments = [
    *TINY,
    f'--config.data.data_dir={data_dir}',
    '--config.data.num_workers=1',  # the signals reach the workers too
    '--config.schedule.max_steps=40',
    '--config.logging.every_steps=5',
    '--config.checkpoint.every_epochs=2',
  ]
  for number, step in ((signal.SIGINT, 10), (signal.SIGTERM, 25)):
    process = start(tmp_path, '--workdir=stopped', *arguments)
    for line in process.stdout:
      if line.startswith(f'step {step}/40'):
        break
    os.killpg(process.pid, number)
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert 'and saved; the same command continues from there' in errors
    assert 'top-1' not in rest

  hang_up(tmp_path, '--workdir=stopped', *arguments)
  code, output, errors = run(tmp_path, '--export=stopped')  # with another config, and no data
  assert code == 0, errors
  assert re.fullmatch(
    r'weights of step \d+ \(moving average\): stopped/weights/model\.safetensors, with a model card\n', output
  )

  results = []
  for workdir in ('stopped', 'straight'):
    code, output, errors = run(tmp_path, f'--workdir={workdir}', *arguments)
    assert code == 0, errors
    assert ('continuing from the checkpoint of step ' in output) == (workdir == 'stopped')
    rows = [json.loads(row) for row in (tmp_path / workdir / 'metrics.jsonl').read_text().splitlines()]
    results.append((output.splitlines()[-1], [row for row in rows if row['kind'] == 'test'][-1]))
    assert f'weights of step 40 (moving average): {workdir}/weights/model.safetensors' in output
  assert results[0] == results[1]
  for name in ('model', 'model_raw'):
    weights = [load_file(tmp_path / workdir / 'weights' / f'{name}.safetensors') for workdir in ('stopped', 'straight')]
    jax.tree.map(np.testing.assert_array_equal, *weights)
  assert results[0][0].startswith('test top-1 ')


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
def test_a_killed_worker_ends_the_run_in_one_line_and_the_state_is_saved(tmp_path, data_dir):
  arguments = [f'--config.data.data_dir={data_dir}', '--config.data.num_workers=2', '--config.logging.every_steps=5']
  process = start(tmp_path, '--workdir=run', *TINY, *arguments)
  for line in process.stdout:
    if line.startswith('step 5/'):
      break
  os.kill(data_workers(process)[0], signal.SIGKILL)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 2
  (line,) = errors.splitlines()
  assert line.startswith('error: a data worker died (')
  (saved,) = (tmp_path / 'run' / 'checkpoints').iterdir()
  assert int(saved.name) >= 5


@pytest.mark.slow
@pytest.mark.needs('tensorflow')
def test_imagenet_from_the_official_tars(tmp_path):
  write_imagenet_tars(tmp_path / 'tars', images_per_class=4, num_validation=10)
  prepare = [sys.executable, '-m', 't2t_vit_jax', 'prepare', 'imagenet2012']
  prepared = subprocess.run(
    [*prepare, '--allow-partial', '--manual-dir', tmp_path / 'tars', '--data-dir', tmp_path / 'data'],
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert prepared.returncode == 0, prepared.stderr
  assert prepared.stdout.splitlines()[-1].endswith('train 16, validation 10 images')
  code, output, errors = run(
    tmp_path,
    f'--config={ROOT}/configs/t2t_vit_14.py',
    '--workdir=run',
    f'--config.data.data_dir={tmp_path}/data',
    '--config.data.num_workers=2',
    '--config.data.batch_size=4',
    '--config.data.eval_batch_size=4',
    '--config.schedule.max_steps=2',
    '--config.model.depth=2',
  )
  assert code == 0, errors
  label, counts = output.splitlines()[-1].split(' % (')
  assert label.startswith('validation top-1 ')
  assert counts.endswith('/10)')


@pytest.mark.slow
def test_an_image_folder_with_unreadable_images(tmp_path):
  folder = write_image_folder(tmp_path / 'data', ('cat', 'dog', 'emu'), train=16, val=7)
  (folder / 'train' / 'cat' / '3.JPEG').write_bytes(b'')
  (folder / 'val' / 'dog' / '0.JPEG').write_bytes(b'no image')
  arguments = [
    '--workdir=run',
    *TINY,
    '--config.data.source=folder',
    f'--config.data.path={folder}',
    '--config.data.eval_split=validation',
    '--config.data.batch_size=16',
    '--config.data.eval_batch_size=4',
    '--config.data.num_workers=2',
    '--config.data.max_bad_fraction=0.03',
    '--config.schedule.max_steps=6',
    '--config.checkpoint.every_epochs=1',
    '--config.logging.every_steps=1',
  ]
  code, output, errors = run(tmp_path, *arguments)
  assert code == 0, errors
  assert errors.count('image cat/3.JPEG cannot be read (no image file); the next one takes its place') == 1
  assert 'image dog/0.JPEG cannot be read (no image file); it counts as wrong' in errors
  assert 'evaluation: ' in output
  assert ' (21 images, 1 unreadable)' in output
  assert output.splitlines()[-1].endswith('/21)')
  rows = [json.loads(row) for row in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  trained = [row for row in rows if row['kind'] == 'train']
  assert trained[-1]['bad_images'] == 1
  assert all(0 <= row['data_wait'] <= 1 for row in trained if 'data_wait' in row)
  assert {row['unreadable'] for row in rows if row['kind'] == 'validation'} == {1}

  (folder / 'train' / 'dog' / '3.JPEG').write_bytes(b'')
  code, output, errors = run(tmp_path, *arguments, '--config.schedule.max_steps=30')
  assert code == 2
  assert '2 of the 48 images of ' in errors.splitlines()[-1]
  assert 'more than data.max_bad_fraction = 0.03 allows; the last is ' in errors.splitlines()[-1]
  # What was done until then is saved: the second one turns up in the ninth batch.
  assert {path.name for path in (tmp_path / 'run' / 'checkpoints').glob('[0-9]*')} == {'6', '8'}


@pytest.mark.slow
def test_digits_learn(tmp_path, data_dir):
  """A sixth of the default run: far above chance, so model, data and optimizer work together."""
  fields = [f'--config.data.data_dir={data_dir}', '--config.schedule.epochs=10']
  # XLA's own flags: programs that compute fast, as for users.
  code, output, errors = run(tmp_path, '--workdir=run', *fields, XLA_FLAGS='')
  assert code == 0, errors
  last = output.splitlines()[-1]
  assert float(last.split()[2]) > 80, last
