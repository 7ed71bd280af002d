"""Steps that are not finite: left out, explained, and not tolerated for long; devices without enough memory."""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from t2t_vit_jax import UserError
from t2t_vit_jax.data.loader import Workers
from t2t_vit_jax.recipe.run import build_run
from t2t_vit_jax.training import loop
from t2t_vit_jax.training.diagnosis import SlowInput, explain, first_nonfinite_layer, out_of_memory
from t2t_vit_jax.workdir.checkpoints import Checkpoints
from t2t_vit_jax.workdir.description import description
from tests.image_folder import encoded, write_image_folder
from tests.test_training_loop import performer_config

pytestmark = pytest.mark.usefixtures('shared_programs')

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
  """Black images, and a white one among them."""
  path = write_image_folder(tmp_path / 'data', ('a', 'b'), train=16, val=2)
  for file in path.rglob('*.JPEG'):
    file.write_bytes(encoded(Image.new('RGB', (16, 16)), 'PNG'))
  (path / 'train' / 'b' / '5.JPEG').write_bytes(encoded(Image.new('RGB', (16, 16), 'white'), 'PNG'))
  return path


def config_of(folder, **changes):
  """Divides by so small a deviation that white overflows float32, while black stays 0."""
  config = performer_config(None, **{
    'data.source': 'folder',
    'data.path': str(folder),
    'data.eval_split': 'val',
    'data.batch_size': 8,
    'data.mean': (0.0, 0.0, 0.0),
    'data.std': (2e-38, 2e-38, 2e-38),
    'augment.crop_padding': 0,
    'schedule.max_steps': 8,
    'logging.every_steps': 1,
    'checkpoint.every_epochs': 1,
    **changes,
  })  # fmt: skip
  return config


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(folder):
  run = build_run(config_of(folder))
  state = run.recipe.make_state(run.recipe.rng)
  batch = {'image': np.zeros((8, 16, 16, 3), np.uint8), 'label': np.zeros(8, np.int32), 'mask': np.ones(8, np.float32)}
  before = jax.device_get(state)
  batch['image'][3] = 255
  state, metrics = run.recipe.train_step(state, batch, run.recipe.rng)
  assert not metrics['applied']
  assert int(state.step) == 1
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state).replace(step=before.step), before)
  batch['image'][3] = 0
  state, metrics = run.recipe.train_step(state, batch, run.recipe.rng)
  assert metrics['applied']
  assert any((x != y).any() for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(before.params), strict=True))


@pytest.mark.slow
def test_the_image_and_the_layer_are_named(folder, tmp_path, capsys):
  loop.train(config_of(folder), tmp_path / 'run')
  rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  skipped = [row['step'] for row in rows if row.get('skipped_steps')]
  assert len(skipped) == 2  # once in each of two epochs of four steps
  assert all(row['loss'] is None for row in rows if row.get('skipped_steps'))
  assert all(np.isfinite(row['loss']) for row in rows if row.get('skipped_steps') == 0)
  warnings = capsys.readouterr().err.splitlines()
  assert warnings == [
    f'warning: 1 step not applied, the first is {step}: '
    'the output of tokens_to_token/attention1/Dropout_0 is not finite for b/5.JPEG'  # which takes the attention's
    for step in skipped
  ]


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_and_leave_the_checkpoint(folder, tmp_path):
  config = config_of(folder, **{'schedule.max_steps': 4, 'data.std': (1.0, 1.0, 1.0)})
  loop.train(config, tmp_path / 'run')
  config = config_of(folder, **{
    'data.mean': (0.5, 0.5, 0.5), 'optimizer.nan_tolerance': 3, 'schedule.max_steps': 12
  })  # fmt: skip
  with pytest.raises(UserError, match=r'3 steps in a row up to 7 had a loss .* lower --config\.schedule\.base_learn'):
    loop.train(config, tmp_path / 'run')
  run = build_run(config)
  with Checkpoints(tmp_path / 'run' / 'checkpoints', read_only=True) as checkpoints:
    assert checkpoints.latest_step == 4
    state = checkpoints.restore(run.recipe.abstract_state, description(run))[0]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


@pytest.mark.slow
def test_a_layer_in_a_loop_over_blocks_is_found(data_dir):
  run = build_run(performer_config(data_dir, **{'model.depth': 3, 'model.scan_blocks': True}))
  state = run.recipe.make_state(run.recipe.rng)
  state.params['blocks']['mlp']['fc2']['kernel'] = state.params['blocks']['mlp']['fc2']['kernel'].at[1].set(jnp.nan)
  assert explain(run, state, step=1).startswith('the output of blocks_1/mlp/fc2 is not finite for ')


@pytest.mark.slow
def test_the_first_layer_in_order_of_computation_is_found(data_dir):
  run = build_run(performer_config(data_dir, **{'model.depth': 2}))
  variables = jax.device_get(run.recipe.make_state(run.recipe.rng).variables())
  images = jnp.zeros((3, 16, 16, 3)).at[1].set(0.5)
  rngs = {'dropout': jax.random.key(0)}
  assert first_nonfinite_layer(run.recipe.model, variables, images, rngs) is None
  for path in (
    ('tokens_to_token', 'attention2', 'kqv'),
    ('blocks_0', 'attn', 'qkv'),
    ('blocks_1', 'mlp', 'fc2'),
    ('norm',),
    ('head',),
  ):
    poisoned = jax.tree.map(np.array, variables)
    layer = poisoned['params']
    for name in path:
      layer = layer[name]
    next(iter(layer.values()))[...] = np.nan
    name, guilty = first_nonfinite_layer(run.recipe.model, poisoned, images, rngs)
    assert name == '/'.join(path)
    assert guilty.all()
  # Only the second image overflows in the first convolution-like layer.
  name, guilty = first_nonfinite_layer(run.recipe.model, variables, images.at[1].set(jnp.inf), rngs)
  assert (name, guilty.tolist()) == ('the augmented image', [False, True, False])


@pytest.mark.slow
def test_too_little_memory_gets_one_line(tmp_path, data_dir):
  """The whole process may have 12 GB of addresses; the step wants far more."""
  process = subprocess.run(
    [
      'prlimit',
      f'--as={12 << 30}',
      sys.executable,
      ROOT / 'train.py',
      f'--workdir={tmp_path}/run',
      f'--config.data.data_dir={data_dir}',
      '--config.model.tokens_type=transformer',
      '--config.data.image_size=256',
      '--config.data.batch_size=256',
    ],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 2, process.stderr
  last = process.stderr.splitlines()[-1]
  assert last.startswith('error: out of memory with a batch of 256 images of 256 px (')
  assert 'accumulate_steps' in last


def test_a_full_disk_is_not_taken_for_a_full_device(data_dir):
  recipe = build_run(performer_config(data_dir)).recipe
  words = 'RESOURCE_EXHAUSTED: Error writing local file "x": No space left on device'
  assert out_of_memory(ValueError(words), recipe) is None  # tensorstore's
  assert out_of_memory(UserError(f'a checkpoint could not be written ({words})'), recipe) is None
  device = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.')
  assert 'accumulate_steps' in str(out_of_memory(device, recipe))


def test_a_run_that_waits_for_images_says_how_many_workers_would_do():
  warnings = []
  slow = SlowInput(Workers(6), processors=16, warn=warnings.append)
  for share, seconds in ((0.4, 40), (0.05, 5), (0.2, 20), (0.4, 40)):  # never three in a row
    slow.note(share, seconds)
  assert warnings == []
  slow.note(0.4, 40)
  slow.note(0.4, 40)
  (line,) = warnings  # and not again
  # Six workers make what is computed in 60 % of the time: ten would make what the devices can take.
  assert (
    line
    == 'training waits for images 40% of its time, with 6 data workers; about 10 would do: --config.data.num_workers=10'
  )


def test_more_workers_than_processors_are_no_advice():
  warnings = []
  slow = SlowInput(Workers(0, 4), processors=4, warn=warnings.append)
  for _ in range(3):
    slow.note(0.5, 5)  # a short run
  assert warnings == []
  slow.note(0.5, 20)
  assert 'with 4 threads; about 8 would do' in warnings[0]
  assert 'may use 4 processors only; --config.data.fast_decode=True' in warnings[0]
