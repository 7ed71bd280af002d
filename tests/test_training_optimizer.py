"""Schedule and optimizer against timm's table and torch."""

import csv

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import pytest
import torch

import configs.default
import t2t_vit_jax
from t2t_vit_jax import UserError
from t2t_vit_jax.training import optimizer
from tests.golden import DATA


def schedule_config(**changes):
  config = configs.default.get_config().schedule
  config.update(changes)
  return config


@pytest.mark.parametrize(('column', 'base'), [('lr_base_5e-4', 5e-4), ('lr_base_1e-3', 1e-3)])
def test_schedule_equals_the_published_one_in_every_epoch(column, base):
  steps_per_epoch = 2502
  schedule = optimizer.learning_rate_schedule(
    schedule_config(base_learning_rate=base), steps_per_epoch=steps_per_epoch, batch_size=512
  )
  with (DATA / 'official_lr_schedule.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert optimizer.total_steps(schedule_config(), steps_per_epoch) == len(rows) * steps_per_epoch
  for row in rows:
    first_step = int(row['epoch']) * steps_per_epoch
    for step in (first_step, first_step + steps_per_epoch - 1):
      assert float(schedule(step)) == pytest.approx(float(row[column]), abs=1e-9)


def test_schedule_by_step_passes_through_the_epochs_values():
  config = schedule_config(granularity='step')
  smooth = optimizer.learning_rate_schedule(config, steps_per_epoch=100, batch_size=512)
  stepwise = optimizer.learning_rate_schedule(schedule_config(), steps_per_epoch=100, batch_size=512)
  for epoch in (0, 5, 9, 10, 150, 299, 300, 309):
    assert float(smooth(100 * epoch)) == pytest.approx(float(stepwise(100 * epoch)), abs=1e-9)
  assert float(smooth(50)) == pytest.approx(1e-6 + 0.5 * (5e-4 - 1e-6) / 10, abs=1e-9)


def test_learning_rate_follows_the_batch():
  schedule = optimizer.learning_rate_schedule(schedule_config(), steps_per_epoch=10, batch_size=1024)
  reference = optimizer.learning_rate_schedule(
    schedule_config(base_learning_rate=1e-3), steps_per_epoch=10, batch_size=512
  )
  assert float(schedule(1500)) == float(reference(1500))


def test_unknown_granularity_is_refused():
  with pytest.raises(UserError, match=r'schedule\.granularity'):
    optimizer.learning_rate_schedule(schedule_config(granularity='day'), steps_per_epoch=1, batch_size=1)


def test_max_steps_cuts_the_run():
  assert optimizer.total_steps(schedule_config(max_steps=7), 100) == 7
  assert optimizer.total_steps(schedule_config(epochs=2, cooldown_epochs=1), 100) == 300


@pytest.mark.parametrize('name', ['t2t_vit_7', 't2t_vit_t_14', 't2t_vit_14_se', 't2t_vit_16_ghost', 't2t_vit_dense'])
def test_what_decays_is_what_has_two_axes_in_torch(name):
  model = t2t_vit_jax.create_model(name)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))['params']
  for path, decays in jax.tree_util.tree_leaves_with_path(optimizer.weight_decay_mask(params)):
    leaf = path[-1].key
    assert leaf in ('kernel', 'bias', 'scale', 'cls_token')
    assert decays == (leaf == 'kernel'), path


# In float32 optax rounds the bias corrections, which torch computes in double: hence the two tolerances.
@pytest.mark.parametrize(('dtype', 'atol'), [('float64', 1e-13), ('float32', 5e-6)])
def test_adamw_equals_torchs_over_fifty_steps(dtype, atol):
  config = ConfigDict(dict(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.05))
  rates = np.linspace(1e-3, 1e-2, 50)
  rng = np.random.default_rng(0)
  start = {'kernel': rng.normal(size=(5, 4)), 'bias': rng.normal(size=4), 'cls_token': rng.normal(size=(1, 1, 3))}
  start = {name: value.astype(dtype) for name, value in start.items()}
  gradients = [{name: rng.normal(size=value.shape).astype(dtype) for name, value in start.items()} for _ in rates]

  with jax.enable_x64(dtype == 'float64'):
    ours = optimizer.make_optimizer(config, lambda step: jnp.asarray(rates, dtype)[step])
    params = {name: jnp.asarray(value) for name, value in start.items()}
    state = ours.init(params)
    for gradient in gradients:
      updates, state = ours.update(gradient, state, params)
      params = optax.apply_updates(params, updates)

  theirs = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
  undecayed = {'params': [theirs['bias'], theirs['cls_token']], 'weight_decay': 0.0}
  adamw = torch.optim.AdamW([{'params': [theirs['kernel']], 'weight_decay': 0.05}, undecayed])
  for rate, gradient in zip(rates, gradients, strict=True):
    for group in adamw.param_groups:
      group['lr'] = float(rate)
    for name, parameter in theirs.items():
      parameter.grad = torch.from_numpy(gradient[name])
    adamw.step()
  for name, parameter in theirs.items():
    assert params[name].dtype == dtype
    np.testing.assert_allclose(params[name], parameter.detach(), atol=atol)
