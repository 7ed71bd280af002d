"""Traces of a run's steps, as JAX's own reader of them finds them."""

import signal

import jax
from jax.profiler import ProfileData
import pytest

from t2t_vit_jax.training import loop
from t2t_vit_jax.workdir.profile import Profile
from tests.test_training_loop import small_config

# Python 3.12 warns of JAX's types, and an error instead would end it within JAX's code.
pytestmark = pytest.mark.filterwarnings('ignore:builtin type:DeprecationWarning')


def traced_steps(workdir):
  (file,) = workdir.glob('tensorboard/plugins/profile/*/*.xplane.pb')
  profile, steps = ProfileData.from_file(str(file)), []  # it must outlive what is read from it
  for plane in profile.planes:
    for line in plane.lines:
      steps += [dict(event.stats)['step_num'] for event in line.events if event.name == 'train']
  return sorted(steps), file.read_bytes()


def config_of(data_dir, profile_steps, max_steps):
  return small_config(data_dir, **{'logging.profile_steps': profile_steps, 'schedule.max_steps': max_steps})


def test_a_trace_has_the_steps_and_scopes_of_the_model_and_ends_with_the_run(data_dir, tmp_path, capsys):
  loop.train(config_of(data_dir, (2, 9), 3), tmp_path)
  steps, content = traced_steps(tmp_path)
  assert steps == [2, 3]
  for scope in (b'/tokens_to_token/', b'/blocks_0/', b'/optimizer/'):
    assert scope in content
  assert f'trace of steps 2 to 3: {tmp_path}/tensorboard; to look at it: ' in capsys.readouterr().out
  loop.train(config_of(data_dir, (2, 3), 4), tmp_path)  # goes on after them
  assert 'none was left to do, so nothing was traced' in capsys.readouterr().out
  assert traced_steps(tmp_path)[0] == [2, 3]


def test_a_signal_ends_a_trace_too(data_dir, tmp_path, monkeypatch):
  train = loop.Trainer.train

  def signalled(self, batch):
    train(self, batch)
    if self.step == 3:
      signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(loop.Trainer, 'train', signalled)
  with pytest.raises(loop.Stopped):
    loop.train(config_of(data_dir, (2, 9), 20), tmp_path)
  assert traced_steps(tmp_path)[0] == [2, 3]


def test_a_trace_that_cannot_be_made_costs_a_warning(tmp_path, capsys):
  (tmp_path / 'tensorboard').write_text('in the way')

  def trace(folder):
    with Profile((1, 1), 1, tmp_path / folder, folder) as profile:
      with profile.step(1):
        pass
      return profile.finished(1, jax.numpy.zeros(()))

  trace('tensorboard')
  with jax.profiler.trace(tmp_path / 'of somebody else'):
    assert not trace('other')
  captured = capsys.readouterr()
  assert captured.out == ''
  first, second = [line for line in captured.err.splitlines() if line.startswith('warning: ')]
  assert first.startswith('warning: tensorboard: the steps could not be traced (')
  assert second.startswith('warning: other: the steps could not be traced (')
