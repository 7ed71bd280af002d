"""Every file in configs/ is a run that can be built."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import configs.default
from t2t_vit_jax import list_models
from t2t_vit_jax.models.soft_split import token_grid
from t2t_vit_jax.training import optimizer
from t2t_vit_jax.training.inputs import eval_transform, train_transform
from t2t_vit_jax.training.run import build_model

NAMES = sorted(path.stem for path in Path(configs.default.__file__).parent.glob('*.py') if path.stem != '__init__')


@pytest.mark.parametrize('name', NAMES)
def test_config_builds(name):
  module = importlib.import_module(f'configs.{name}')
  assert module.__doc__
  config = module.get_config()
  assert sorted(config) == sorted(configs.default.get_config())
  model = build_model(config, num_classes=10)
  size = config.data.image_size
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
  height, width = token_grid((size, size))
  assert shapes['frozen']['pos_embed'].shape == (1, 1 + height * width, model.embed_dim)
  schedule = optimizer.learning_rate_schedule(config.schedule, steps_per_epoch=10, batch_size=config.data.batch_size)
  assert 0 < float(schedule(0)) < float(schedule(10 * config.schedule.warmup_epochs))
  # These raise if a field does not fit.
  jax.eval_shape(optimizer.make_optimizer(config.optimizer, schedule).init, shapes['params'])
  train_transform(config)
  eval_transform(config)


def test_configs_named_after_models_train_them():
  for name in set(NAMES) & set(list_models()):
    assert importlib.import_module(f'configs.{name}').get_config().model.name == name


def test_the_default_is_the_published_recipe():
  config = configs.default.get_config()
  assert (config.data.batch_size, config.schedule.base_learning_rate) == (512, 5e-4)
  assert (config.optimizer.weight_decay, config.augment.label_smoothing) == (0.05, 0.1)
  assert (config.ema.decay, config.model.stochastic_depth_rate, config.model.dtype) == (0.99996, 0.1, 'bfloat16')
