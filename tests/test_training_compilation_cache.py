"""Where compiled programs are kept, and that the next start takes them from there."""

import json
import os
import sys

import jax
import pytest

from t2t_vit_jax import UserError
from t2t_vit_jax.training.compilation_cache import keep_programs
from tests.processes import ROOT, finish, start_command

SETTINGS = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')


@pytest.fixture
def no_cache(monkeypatch):
  """JAX as in a process whose user said nothing about the cache."""
  before = {name: jax.config.values[name] for name in SETTINGS}
  monkeypatch.delenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS')
  jax.config.update('jax_compilation_cache_dir', None)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_a_cpu_keeps_programs_only_where_it_is_told(no_cache, tmp_path):
  assert keep_programs('') == keep_programs('none') == []
  assert jax.config.values['jax_compilation_cache_dir'] is None
  assert keep_programs(f'{tmp_path}/new/programs') == [
    f'compiled programs: kept in {tmp_path}/new/programs for the next start'
  ]
  assert [jax.config.values[name] for name in SETTINGS] == [f'{tmp_path}/new/programs', 0]


def test_an_accelerator_keeps_programs_in_the_cache_folder(no_cache, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setenv('T2T_VIT_JAX_CACHE', str(tmp_path))
  assert keep_programs('none') == []
  assert str(tmp_path / 'programs') in keep_programs('')[0]


def test_what_the_user_told_jax_counts_more(no_cache, tmp_path, monkeypatch):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'own'))  # as from the environment
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 7.0)
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '7')
  assert str(tmp_path / 'own') in keep_programs(str(tmp_path / 'other'))[0]
  assert [jax.config.values[name] for name in SETTINGS] == [str(tmp_path / 'own'), 7]


def test_a_folder_that_cannot_be_made_is_refused_if_the_user_chose_it(no_cache, tmp_path, monkeypatch, capsys):
  (tmp_path / 'file').write_text('in the way')
  with pytest.raises(UserError, match=r'compilation_cache_dir: .*/file/x: Not a directory'):
    keep_programs(str(tmp_path / 'file' / 'x'))
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setenv('T2T_VIT_JAX_CACHE', str(tmp_path / 'file'))
  assert keep_programs('') == []
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('warning: compiled programs cannot be kept in ')


START = """
import collections, json, sys
import jax
from tests.test_training_loop import small_config
from t2t_vit_jax.training import loop
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **unused: counts.update([name]))
data_dir, cache, workdir, steps = sys.argv[1:]
loop.train(small_config(data_dir, **{'compilation_cache_dir': cache, 'schedule.max_steps': int(steps)}), workdir)
names = 'compile_requests_use_cache', 'cache_hits', 'cache_misses'
print(json.dumps([counts[f'/jax/compilation_cache/{name}'] for name in names]))
"""


@pytest.mark.slow
def test_the_second_start_compiles_nothing(tmp_path, data_dir):
  """JAX counts programs that it needs, finds and compiles: in a run, the same again, and one that goes on, twice."""
  environment = {name: value for name, value in os.environ.items() if not name.startswith('JAX_')}

  def start(workdir, steps):
    command = (sys.executable, '-c', START, data_dir, tmp_path / 'cache', tmp_path / workdir, steps)
    process = start_command('env', '-i', *(f'{k}={v}' for k, v in environment.items()), *command, cwd=ROOT)
    ((code, output, errors),) = finish([process])
    assert code == 0, errors
    return json.loads(output.splitlines()[-1])

  needed, found, compiled = start('one', 1)
  assert (found, compiled) == (0, needed)
  assert 3 <= needed <= 12  # make_state, train_step, eval_step and few small ones
  assert start('two', 1) == [needed, needed, 0]
  start('one', 2)  # goes on from a checkpoint, whose checksums have programs of their own
  needed, found, compiled = start('two', 2)
  assert (found, compiled) == (needed, 0)
