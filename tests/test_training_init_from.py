"""Training that starts from a weight file."""

import jax
import numpy as np
import pytest

from configs import digits
from t2t_vit_jax import UserError, load_pretrained
from t2t_vit_jax.conversion import Options, convert
from t2t_vit_jax.training.run import build_run
from tests import golden


@pytest.fixture(name='config')
def fixture_config(data_dir):
  """The golden performer, for digits."""
  config = digits.get_config()
  config.data.data_dir = data_dir
  config.data.batch_size = 16
  for field in ('embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'token_dim'):
    config.model[field] = golden.TINY[field]
  return config


@pytest.fixture(name='weights')
def fixture_weights(tmp_path):
  path = tmp_path / 'weights.safetensors'
  convert(golden.DATA / 'official_tiny_performer.pth.tar', path, Options(settings={'num_heads': 4}, num_classes=7))
  return path


@pytest.mark.slow
def test_a_run_starts_with_the_files_weights_and_trains(config, weights, tmp_path):
  config.init_from = str(weights)
  run = build_run(config)
  state = run.fresh_state()
  loaded = load_pretrained(weights, num_classes=10, image_size=32, seed=config.seed)[1]
  assert loaded['frozen']['pos_embed'].shape == (1, 1 + 2 * 2, 64)
  for params in (state.params, state.ema):
    jax.tree.map(np.testing.assert_array_equal, params, loaded['params'])
  jax.tree.map(np.testing.assert_array_equal, state.frozen, loaded['frozen'])
  assert int(state.step) == 0
  images = np.zeros((16, 32, 32, 3), np.uint8)
  batch = {'image': images, 'label': np.zeros(16, np.int32)}
  state, metrics = run.train_step(state, batch, run.rng)  # donates the state's buffers
  assert np.isfinite(metrics['loss'])
  assert int(state.step) == 1


def test_a_torch_checkpoint_will_do(config):
  config.init_from = str(golden.DATA / 'official_tiny_performer.pth.tar')
  state = build_run(config).fresh_state()
  expected = golden.load_variables('performer')['params']['blocks_0']
  jax.tree.map(np.testing.assert_array_equal, dict(state.params['blocks_0']), expected)


def test_another_model_is_refused(config, weights):
  config.init_from = str(weights)
  config.model.depth = 3
  with pytest.raises(UserError, match='depth=2 instead of 3'):
    build_run(config).fresh_state()
  config.model.depth = 2
  config.model.num_heads = 8
  with pytest.raises(UserError, match='num_heads=4, not 8'):
    build_run(config).fresh_state()
