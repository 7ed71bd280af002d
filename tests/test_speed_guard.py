"""Nothing may make programs dearer unnoticed: figures that need no clock, beside those in speed_guard.json.

With the versions that the file was made with, no figure may be more than 5 % above the file's: that much may differ
between machines. With any versions, no figure's ratio to the literal form's, compiled in the same run, may be more than
10 % above the file's ratio. `python -m tests.speed_guard` renews the file.
"""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import pytest

from configs import digits
from t2t_vit_jax.training import loop
from tests import speed_guard

ABSOLUTE_MARGIN, RATIO_MARGIN = 1.05, 1.10
ROOT = Path(__file__).parents[1]


def ratio(figures, name, kind):
  """To the literal form of the same computation."""
  return figures[name][kind] / figures[f'{name.split(",")[0]}, literal'][kind]


def dearer(found, golden):
  """What is above its margin, in words."""
  complaints = []
  for name, figures in golden['figures'].items():
    for kind, value in figures.items():
      now = found['figures'][name][kind]
      if found['versions'] == golden['versions'] and now > ABSOLUTE_MARGIN * value:
        complaints.append(f'{name}: {kind} {now:,.0f}, golden {value:,.0f} ({now / value:.3f} times)')
      now, then = (ratio(x['figures'], name, kind) for x in (found, golden))
      if now > RATIO_MARGIN * then:
        complaints.append(f'{name}: {kind} are {now:.3f} times those of the literal form, golden {then:.3f}')
  return complaints


@pytest.fixture(scope='module')
def golden():
  return json.loads(speed_guard.GOLDEN.read_text())


@pytest.fixture(scope='module')
def on_cpu():
  return speed_guard.cpu_figures()


@pytest.mark.slow
def test_programs_for_cpu(on_cpu, golden):
  assert dearer(on_cpu, golden['cpu']) == []


@pytest.mark.slow
def test_forms_on_cpu(on_cpu):
  """What the forms are for, whatever the file says."""
  figures = on_cpu['figures']
  for name in ('forward', 'value_and_grad'):
    assert ratio(figures, name, 'flops') <= 1
    assert ratio(figures, name, 'bytes') <= 1
    assert ratio(figures, name, 'temporaries') <= 1
  loop, remat = figures['value_and_grad, loop'], figures['value_and_grad, loop with remat']
  assert remat['temporaries'] < 0.75 * loop['temporaries']
  assert remat['product_flops'] > loop['product_flops']


def figures_of(part):
  """Figures of a part of the file, computed in a process of its own."""
  command = [sys.executable, '-m', 'tests.speed_guard', part]
  done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True)
  return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.needs('libtpu')
def test_programs_for_tpu(golden):
  found = figures_of('tpu')
  assert dearer(found, golden['tpu']) == []
  assert ratio(found['figures'], 'forward', 'hbm_bytes') <= 1
  assert ratio(found['figures'], 'forward', 'cycles') <= 1


@pytest.mark.slow
@pytest.mark.needs('jax_cuda13_plugin')
def test_programs_for_gpu(golden):
  found = figures_of('gpu')
  assert dearer(found, golden['gpu']) == []
  for name in ('forward', 'value_and_grad'):
    assert ratio(found['figures'], name, 'hbm_bytes') <= 1
  assert ratio(found['figures'], 'value_and_grad', 'temporaries') <= 1


def test_the_guard_sees_what_is_dearer():
  def measured(literal, default, version):
    figures = {'forward, literal': {'bytes': literal}, 'forward': {'bytes': default}}
    return {'versions': {'jax': version}, 'figures': figures}

  golden = measured(100, 50, '1')
  assert dearer(measured(104, 52, '1'), golden) == []
  assert dearer(measured(200, 100, '2'), golden) == []  # another compiler; the forms are as they were
  assert dearer(measured(100, 53, '1'), golden) == ['forward: bytes 53, golden 50 (1.060 times)']
  assert dearer(measured(100, 56, '2'), golden) == [
    'forward: bytes are 0.560 times those of the literal form, golden 0.500'
  ]


@pytest.mark.slow
def test_fifty_steps_compile_once(data_dir, tmp_path, caplog):
  config = digits.get_config()
  config.data.data_dir = data_dir
  config.update_from_flattened_dict(
    {'model.depth': 1, 'model.embed_dim': 32, 'model.token_dim': 16, 'data.image_size': 16, 'data.batch_size': 16}
  )
  config.update_from_flattened_dict({'schedule.max_steps': 50, 'logging.every_steps': 10, 'mesh.data': 1})
  with jax.log_compiles():
    loop.train(config, tmp_path)
  compiled = [
    record.getMessage().split()[4] for record in caplog.records if 'Finished XLA compilation of' in record.getMessage()
  ]
  assert compiled.count('jit(train_step)') == 1
  assert compiled.count('jit(eval_step)') == 1
  between = compiled[compiled.index('jit(train_step)') + 1 : compiled.index('jit(eval_step)')]
  assert between == []
