"""Rows reach Weights & Biases and MLflow, as their own libraries read them; and no trouble there reaches the run."""

import threading
import time

from etils import epath
import pytest

from t2t_vit_jax import UserError
from t2t_vit_jax.training import loop
from t2t_vit_jax.workdir import trackers
from t2t_vit_jax.workdir.folder import Workdir
from tests.test_training_loop import small_config

CONFIG = {'seed': 7, 'model': {'name': 't2t_vit_7', 'depth': None}, 'logging': {'tracker': ''}}


def send(name, folder, steps, *, completed=True, first_step=0):
  senders = trackers.start_trackers(name, Workdir(epath.Path(folder), folder), CONFIG, first_step=first_step)
  for step in steps:
    for sender in senders:
      sender.write(step, {'train/loss': step / 2})
  trackers.close_trackers(senders, completed=completed)


@pytest.mark.slow
@pytest.mark.needs('wandb')
def test_wandb_keeps_a_run_offline_and_goes_on_with_it(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  send('wandb', tmp_path, [1, 2], completed=False)
  send('wandb', tmp_path, [3], first_step=2)
  run_id = (tmp_path / 'wandb_run_id').read_text().strip()
  files = sorted(tmp_path.glob(f'wandb/offline-run-*/run-{run_id}.wandb'))
  contents = [file.read_bytes() for file in files]
  assert [b'train/loss' in content for content in contents] == [True, True]
  assert all(b't2t_vit_7' in content for content in contents)
  captured = capsys.readouterr()
  assert captured.out == 2 * f'wandb: run {run_id} at {tmp_path}/wandb\n'
  assert captured.err == ''
  send('wandb', tmp_path, [1])  # from its start: another run
  assert (tmp_path / 'wandb_run_id').read_text().strip() != run_id


@pytest.mark.slow
@pytest.mark.needs('mlflow')
@pytest.mark.filterwarnings('ignore::Warning')  # of SQLAlchemy and pydantic about themselves
def test_mlflow_gets_rows_and_config_and_goes_on_with_a_run(tmp_path, monkeypatch, capsys):
  import mlflow

  mlflow.set_tracking_uri(f'sqlite:///{tmp_path}/own.db')
  send('mlflow', tmp_path, [1, 2], completed=False)
  run_id, client = (tmp_path / 'mlflow_run_id').read_text().strip(), mlflow.MlflowClient()
  assert client.get_run(run_id).info.status == 'KILLED'
  send('mlflow', tmp_path, [3], first_step=2)
  run = client.get_run(run_id)
  assert run.info.status == 'FINISHED'
  assert run.data.params == {'seed': '7', 'model.name': 't2t_vit_7'}
  assert [(x.step, x.value) for x in client.get_metric_history(run_id, 'train/loss')] == [(1, 0.5), (2, 1), (3, 1.5)]
  assert capsys.readouterr().err == ''


class Broken:
  """A tracker whose network is gone."""

  def __init__(self, *unused):
    self.run_id, self.place = '1', 'nowhere'

  def write(self, step, values):
    raise ConnectionError('no route')

  def close(self, *, completed):
    raise ConnectionError('no route')


class Silent(Broken):
  """A tracker whose network never answers."""

  def write(self, step, values):
    threading.Event().wait(60)


def test_a_tracker_that_fails_or_hangs_costs_a_warning(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(trackers, 'TRACKERS', {'broken': Broken, 'silent': Silent, 'none': None})
  monkeypatch.setattr(trackers, 'CLOSE_TIMEOUT_S', 0.5)
  started = time.monotonic()
  send('broken,silent,none', tmp_path, range(1000))
  assert time.monotonic() - started < 5
  assert sorted(capsys.readouterr().err.splitlines()) == [
    'warning: broken: ConnectionError: no route; the run goes on, and metrics.jsonl has all rows',
    "warning: none: TypeError: 'NoneType' object is not callable; the run goes on, and metrics.jsonl has all rows",
    'warning: silent: not all was sent within 0.5 s; the run goes on, and metrics.jsonl has all rows',
  ]


def test_a_run_sends_the_rows_that_tensorboard_gets(data_dir, tmp_path, monkeypatch):
  rows, closed = [], []

  class Kept(Broken):
    def write(self, step, values):
      rows.append((step, values))

    def close(self, *, completed):
      closed.append(completed)

  monkeypatch.setattr(trackers, 'TRACKERS', {'json': Kept})
  loop.train(small_config(data_dir, **{'schedule.max_steps': 1, 'logging.tracker': 'json'}), tmp_path)
  assert [step for step, _ in rows] == [1, 1, 1]
  names = {name for _, values in rows for name in values}
  assert {'train/loss', 'train/learning_rate', 'test/raw/top1', 'test/ema/top1'} <= names
  assert closed == [True]


def test_an_unknown_or_missing_tracker_is_refused_before_anything_is_built(data_dir, tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r"logging\.tracker must be 'wandb' or 'mlflow', not 'wand'"):
    loop.train(small_config(data_dir, **{'logging.tracker': 'wand'}), tmp_path / 'run')
  monkeypatch.setattr(trackers, 'TRACKERS', {'no_such_library': None})
  with pytest.raises(UserError, match=r"logging\.tracker='no_such_library' needs no_such_library: pip install"):
    trackers.check_trackers('no_such_library')
  assert not (tmp_path / 'run').exists()
