"""What a config says of the optimizer reaches the training step."""

import jax
import numpy as np
import pytest

from configs import digits
from t2t_vit_jax import UserError
from t2t_vit_jax.recipe.run import build_run
from tests.image_folder import write_image_folder


def one_step(data_dir, **changes):
  """A small run's parameters before and after its first step, and the step's metrics."""
  config = digits.get_config()
  small = {'model.depth': 1, 'model.embed_dim': 32, 'model.token_dim': 16, 'model.dropout_rate': 0.5}
  config.update_from_flattened_dict({'data.data_dir': data_dir, 'data.batch_size': 64, **small, **changes})
  run = build_run(config)
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8),
    'label': rng.integers(0, 10, 64, dtype=np.int32),
  }
  before = jax.device_get(run.recipe.make_state(run.recipe.rng))
  after, metrics = jax.device_get(run.recipe.train_step(run.recipe.make_state(run.recipe.rng), batch, run.recipe.rng))
  return before.params, after.params, metrics


def test_data_of_a_single_class_is_refused(tmp_path):
  """Such as a folder too high up: what it trained would be right by 100 %."""
  folder = write_image_folder(tmp_path, ('imagenet',), train=8, val=2)
  config = digits.get_config()
  config.data.update(source='folder', path=str(folder), eval_split='val')
  with pytest.raises(UserError, match=r"/train has only one class, 'imagenet': a folder for each is expected"):
    build_run(config)


@pytest.mark.slow
def test_accumulation_and_backbone_factor(data_dir):
  start = {'schedule.warmup_epochs': 0}
  before, whole, metrics = one_step(data_dir, **start)
  _, parts, parts_metrics = one_step(data_dir, **start, **{'optimizer.accumulate_steps': 4})
  _, slow, _ = one_step(data_dir, **start, **{'schedule.backbone_factor': 0.1})
  _, probe, _ = one_step(data_dir, **start, **{'schedule.backbone_factor': 0.0})
  # Parts draw other dropout masks.
  assert float(metrics['loss']) != pytest.approx(float(parts_metrics['loss']), rel=1e-4)
  assert not np.allclose(whole['head']['kernel'], parts['head']['kernel'], atol=1e-6)
  for after in (slow, probe):
    np.testing.assert_allclose(after['head']['kernel'], whole['head']['kernel'], atol=1e-6)
  kernels = [np.asarray(params['tokens_to_token']['project']['kernel']) for params in (before, whole, slow, probe)]
  moves = [kernel - kernels[0] for kernel in kernels[1:]]
  # At step 0 the cosine is at its peak: the rate that both groups end at does not show yet.
  np.testing.assert_allclose(moves[1], 0.1 * moves[0], atol=2e-6)
  assert np.abs(moves[0]).max() > 5e-4
  assert not moves[2].any()


def test_a_count_of_parts_that_does_not_fit_is_refused(data_dir):
  with pytest.raises(UserError, match=r'accumulate_steps 3 does not divide the 32 images of each of 2 devices'):
    one_step(data_dir, **{'optimizer.accumulate_steps': 3})


def test_an_unknown_optimizer_is_refused(data_dir):
  with pytest.raises(UserError, match=r"optimizer\.name must be 'adamw' or 'sgd', not 'lamb'"):
    one_step(data_dir, **{'optimizer.name': 'lamb'})
