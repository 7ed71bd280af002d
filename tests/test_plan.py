"""`python -m t2t_vit_jax.plan`: its search, what it refuses, and one real compilation for a TPU."""

import importlib
import importlib.util
import json
import os
from pathlib import Path
import re
import subprocess
import sys

import pytest

from t2t_vit_jax import UserError
from t2t_vit_jax.plan import batch_unit, data_size, search_batch
from t2t_vit_jax.planning import report

ROOT = Path(__file__).parents[1]
TINY = ['--config=configs/digits.py', '--config.model.depth=1', '--config.model.embed_dim=64']
DIGITS = ['--num_classes=10', '--train_images=1437']


def plan(*arguments):
  environment = {name: value for name, value in os.environ.items() if name != 'JAX_PLATFORMS'}
  command = [sys.executable, '-m', 't2t_vit_jax.plan', *map(str, arguments)]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
  ('limit', 'unit', 'start', 'found', 'most_tries'),
  [
    (300, 1, 128, 288, 6),  # 128 256 no:512 | no:384 no:320 288
    (100, 1, 128, 96, 6),  # no:128 64 | 96 no:112 no:104
    (40, 16, 128, 32, 6),  # no:128 no:64 32 | no:48
    (10, 16, 128, 0, 5),  # no:128 no:64 no:32 no:16
    (64, 64, 2, 64, 3),  # 64 no:128
  ],
)
def test_search_batch(limit, unit, start, found, most_tries):
  tried = []

  def fits(images):
    tried.append(images)
    return images <= limit

  assert search_batch(fits, unit, start) == found
  assert len(tried) <= most_tries
  assert len(set(tried)) == len(tried)
  assert all(images % unit == 0 for images in tried)


def test_batch_unit():
  assert batch_unit(group_size=64, num_chips=4, accumulate_steps=1) == 16  # 4 chips hold a group
  assert batch_unit(group_size=64, num_chips=256, accumulate_steps=1) == 1
  assert batch_unit(group_size=64, num_chips=48, accumulate_steps=1) == 4  # 192 images are 3 groups and 4 a chip
  assert batch_unit(group_size=64, num_chips=4, accumulate_steps=2) == 128
  assert batch_unit(group_size=1, num_chips=4, accumulate_steps=1) == 1


def test_imagenet_needs_no_data(tmp_path):
  config = importlib.import_module('configs.t2t_vit_14').get_config()
  config.data.data_dir = str(tmp_path)
  assert data_size(config, None, None) == (1000, 1_281_167)
  assert data_size(config, 7, None) == (7, 1_281_167)


def test_other_data_must_be_there_or_described(tmp_path):
  config = importlib.import_module('configs.t2t_vit_14_cifar10').get_config()
  config.data.data_dir = str(tmp_path)
  with pytest.raises(UserError, match=r'cifar10 is not prepared.*or plan without data: --num_classes=N --train_images'):
    data_size(config, None, None)
  assert data_size(config, 10, 50_000) == (10, 50_000)


def test_collectives_of_a_kind_are_told_together():
  transfers = [('all-reduce', 'bf16', 3_000_000, 2, False), ('all-reduce', 'f32', 1_000_000, 1, False)]
  transfers += [('all-reduce', 'u32', 4, 8, True), ('all-gather', 'f32', 12, 1, False)]
  names = ('kind', 'dtype', 'num_bytes', 'count', 'in_open_loop')
  step = {'collectives': [dict(zip(names, transfer, strict=True)) for transfer in transfers]}
  assert report.collectives(step) == (
    '1 all-gather of 12 bytes f32, 3 all-reduce of 7.0 MB bf16+f32, '
    '8 all-reduce of 32 bytes u32 in loops of unknown length'
  )


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--topology=v5e:2x2'], 'which run? Give --config=CONFIG'),
    ([*TINY, *DIGITS], 'give either --topology or --compare'),
    ([*TINY, '--config.model.dept=1', '--topology=v5e:2x2'], "unknown config field 'model.dept': did you mean"),
    ([*TINY, *DIGITS, '--topology=v5e:2x2', '--output=nowhere/x.json'], 'there is no folder'),
  ],
)
def test_bad_command_lines_get_one_line_and_exit_code_2(arguments, message):
  code, output, errors = plan(*arguments)
  assert (code, output) == (2, '')
  assert errors.count('\n') == 1
  assert errors.startswith('error: ')
  assert message in errors


@pytest.mark.slow
@pytest.mark.needs('jax_cuda13_plugin')
def test_the_gpu_compiler(tmp_path):
  """A real compilation: what follows from the model must be in what the compiler says."""
  code, output, errors = plan(*TINY, *DIGITS, '--topology=h100:4', f'--output={tmp_path}/plan.json')
  assert (code, errors) == (0, '')
  result = json.loads((tmp_path / 'plan.json').read_text())
  train = result['train_step']
  assert (result['chips'], result['hosts'], result['images_per_chip']) == (4, 1, 32)
  exchanged = sum(x['count'] * x['num_bytes'] for x in train['collectives'])
  assert exchanged == pytest.approx(4 * result['parameters'], rel=0.01)
  assert train['arguments'] == pytest.approx(result['state'] + 32 * (32 * 32 * 3 + 4), rel=0.01)
  # State and moments are read and written, images read, at the least.
  assert train['hbm_bytes'] > 2 * result['state']
  assert train['roofline_ms'] == max(train['arithmetic_ms'], train['bandwidth_ms'])
  assert train['arithmetic_ms'] == pytest.approx(1e3 * train['flops'] / 989e12)
  assert result['eval_step']['flops'] / 90 < train['flops'] / 32 < 4 * result['eval_step']['flops'] / 90
  assert 'not a measurement' in output
  assert "the compiler's estimate" not in output


@pytest.mark.slow
@pytest.mark.needs('jax_cuda13_plugin')
def test_what_does_not_fit_on_a_gpu_is_said():
  code, output, _ = plan(*TINY, *DIGITS, '--config.data.image_size=4096', '--topology=h100')
  assert code == 0
  assert re.search(
    r'training step, on each chip:\n  memory: DOES NOT FIT: the program needs [\d.]+ GiB of 79.11 GiB', output
  )


@pytest.mark.slow
@pytest.mark.needs('libtpu')
def test_a_slice_that_libtpu_does_not_know():
  code, _, errors = plan(*TINY, *DIGITS, '--topology=v5e:5x7')
  assert code == 2
  assert errors.startswith('error: libtpu knows no slice v5e:5x7: choose one such as v4:4x4x4, v5e:2x2')
  assert errors.count('\n') == 1


@pytest.mark.slow
@pytest.mark.needs('libtpu')
def test_the_tpu_compiler(tmp_path):
  """A real compilation: what follows from the model must be in what the compiler says."""
  # Such tokens compile in a third of the time, and arrays of this width need no padding.
  flags = [*TINY, *DIGITS, '--config.model.tokens_type=convolution', '--config.model.embed_dim=128']
  code, output, errors = plan(*flags, '--topology=v5e:2x2', f'--output={tmp_path}/plan.json')
  assert (code, errors) == (0, '')
  result = json.loads((tmp_path / 'plan.json').read_text())
  train, evaluation = result['train_step'], result['eval_step']
  assert (result['chips'], result['hosts'], result['images_per_chip']) == (4, 1, 32)
  assert result['mesh'] == {'data': 4, 'fsdp': 1}
  # Chips exchange a step's gradients, but for what they may compute of other ones, in float32.
  exchanged = sum(x['count'] * x['num_bytes'] for x in train['collectives'])
  assert exchanged == pytest.approx(4 * result['parameters'], rel=0.01)
  assert evaluation['collectives'] == []  # each device keeps what it says of its own images
  # Parameters, average and two moments, then images and labels; small arrays are padded to whole tiles.
  assert result['state'] >= 4 * 4 * result['parameters']
  at_least = result['state'] + 32 * (32 * 32 * 3 + 4)
  assert at_least <= train['arguments'] <= 2 * at_least
  assert train['fits']
  assert 0 < train['memory'] < 16 * 2**30
  # Gradients cost up to twice the forward pass, on top of it; evaluation has 90 images on a chip, training 32.
  assert evaluation['flops'] / 90 < train['flops'] / 32 < 4 * evaluation['flops'] / 90
  assert train['roofline_ms'] < train['compiler_estimate_ms']
  days = result['total_steps'] * train['compiler_estimate_ms'] / 1e3 / 86400
  assert train['compiler_estimate']['days'] == pytest.approx(days)
  assert "the compiler's estimate, not a measurement" in output
