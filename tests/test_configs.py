"""Every file in configs/ is a run that can be built, and has the published numbers."""

import dataclasses
import importlib
import json
from typing import NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import pytest

import configs.default
from docs import recipe_table
from t2t_vit_jax import list_models
from t2t_vit_jax.conversion import Options, convert
from t2t_vit_jax.data.pipeline import eval_transform, train_transform
from t2t_vit_jax.models.soft_split import token_grid
from t2t_vit_jax.models.variants import DataDefaults
from t2t_vit_jax.recipe import optimizer
from t2t_vit_jax.recipe.build import build_model
from t2t_vit_jax.recipe.init_from import resolve, resolve_for_evaluation
from t2t_vit_jax.training import loop
from tests import golden
from tests.parameters import slow_but

NAMES = recipe_table.config_names()


class Published(NamedTuple):
  """What the reference's page and the paper say of a run."""

  top1: float
  model: str
  batch_size: int = 512
  learning_rate: float = 5e-4
  weight_decay: float = 0.05
  epochs: int = 310
  image_size: int = 224


PUBLISHED = {
  't2t_vit_7': Published(71.7, 't2t_vit_7', 512, 1e-3, 0.03),
  't2t_vit_10': Published(75.2, 't2t_vit_10', 512, 1e-3, 0.03),
  't2t_vit_12': Published(76.5, 't2t_vit_12', 512, 1e-3, 0.03),
  't2t_vit_14': Published(81.5, 't2t_vit_14', 512, 5e-4, 0.05),
  't2t_vit_19': Published(81.9, 't2t_vit_19', 512, 5e-4, 0.065),
  't2t_vit_24': Published(82.3, 't2t_vit_24', 512, 5e-4, 0.065),
  't2t_vit_t_14': Published(81.7, 't2t_vit_t_14', 512, 5e-4, 0.05),
  't2t_vit_t_19': Published(82.4, 't2t_vit_t_19', 512, 5e-4, 0.065),
  't2t_vit_t_24': Published(82.6, 't2t_vit_t_24', 512, 5e-4, 0.065),
  't2t_vit_14_384': Published(83.3, 't2t_vit_14', image_size=384),
  't2t_vit_14_resnext': Published(81.5, 't2t_vit_14_resnext'),
  't2t_vit_14_wide': Published(77.9, 't2t_vit_14_wide'),
  't2t_vit_14_se': Published(81.6, 't2t_vit_14_se'),
  't2t_vit_16_ghost': Published(79.5, 't2t_vit_16_ghost'),
  't2t_vit_dense': Published(80.6, 't2t_vit_dense'),
  't2t_vit_14_convolution': Published(80.8, 't2t_vit_14'),
  't2t_vit_14_cifar10': Published(98.3, 't2t_vit_14', 64, 0.05, 5e-4, 60),
  't2t_vit_14_cifar100': Published(88.4, 't2t_vit_14', 64, 0.05, 5e-4, 60),
  't2t_vit_19_cifar10': Published(98.4, 't2t_vit_19', 64, 0.05, 5e-4, 60),
  't2t_vit_19_cifar100': Published(89.0, 't2t_vit_19', 64, 0.05, 5e-4, 60),
}
ASSUMED = ('14_384', '14_resnext', '14_wide', '14_se', '16_ghost', 'dense', '14_convolution')
CIFAR = [name for name in PUBLISHED if 'cifar' in name]


def load(name):
  module = importlib.import_module(f'configs.{name}')
  return module.get_config(), module.__doc__


def differences(config, other):
  one, two = (traverse_util.flatten_dict(tree.to_dict(), sep='.') for tree in (config, other))
  assert one.keys() == two.keys()
  return {field for field in one if one[field] != two[field]}


@pytest.mark.parametrize('name', slow_but(('default', 'digits', 'finetune', 't2t_vit_14_cifar10'), ['default', *NAMES]))
def test_config_builds(name):
  config, _ = load(name)
  if name == 'finetune':  # as with weights that say how their images are prepared
    config = resolve_for_evaluation(config, dataclasses.asdict(DataDefaults()), 3, 'weights')
    config.model.name = 't2t_vit_14'
  config = resolve(config)
  model = build_model(config, num_classes=10)
  size = config.data.image_size
  shapes = golden.shapes_of(model, jnp.zeros((1, size, size, 3)))
  height, width = token_grid((size, size))
  assert shapes['frozen']['pos_embed'].shape == (1, 1 + height * width, model.embed_dim)
  schedule = optimizer.learning_rate_schedule(config.schedule, steps_per_epoch=10, batch_size=config.data.batch_size)
  # These raise if a field does not fit.
  jax.eval_shape(optimizer.make_optimizer(config.optimizer, schedule, schedule).init, shapes['params'])
  train_transform(config)
  eval_transform(config)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_numbers(name):
  config, card = load(name)
  published = PUBLISHED[name]
  assert card.count(f'\nPublished top-1: {published.top1} % (') == 1
  assert config.model.name == published.model
  assert config.data.image_size == published.image_size
  assert config.data.batch_size == published.batch_size
  assert config.optimizer.weight_decay == published.weight_decay
  schedule = optimizer.learning_rate_schedule(config.schedule, steps_per_epoch=1, batch_size=published.batch_size)
  # The first epoch after the warmup of ten, or of none, on a cosine that starts at epoch 0.
  first, final, length = (0, 2e-4, 60) if name in CIFAR else (10, 1e-5, 300)
  peak = published.learning_rate
  expected = final + (peak - final) * (1 + jnp.cos(jnp.pi * first / length)) / 2
  assert float(schedule(first)) == pytest.approx(float(expected), rel=1e-5)
  assert float(schedule(published.epochs)) == pytest.approx(final)
  assert optimizer.total_steps(config.schedule, 1) == published.epochs


@pytest.mark.parametrize('name', [name for name in PUBLISHED if name not in CIFAR])
def test_imagenet_runs_differ_from_the_default_in_published_fields_only(name):
  config, card = load(name)
  assert differences(config, configs.default.get_config()) <= {
    'model.name',
    'model.tokens_type',
    'data.image_size',
    'schedule.base_learning_rate',
    'optimizer.weight_decay',
  }
  assert (config.model.tokens_type == 'convolution') == (name == 't2t_vit_14_convolution')
  assert ('assumed' in card) == (name.removeprefix('t2t_vit_') in ASSUMED)


def test_the_default_is_the_published_recipe():
  config = configs.default.get_config()
  assert (config.data.batch_size, config.schedule.base_learning_rate) == (512, 5e-4)
  assert (config.optimizer.weight_decay, config.augment.label_smoothing) == (0.05, 0.1)
  assert (config.ema.decay, config.model.stochastic_depth_rate, config.model.dtype) == (0.99996, 0.1, 'bfloat16')
  assert (config.augment.mixing_group_size, config.schedule.base_batch_size) == (64, 512)
  assert (config.optimizer.name, config.optimizer.gradient_clip_norm, config.optimizer.accumulate_steps) == (
    'adamw',
    0.0,
    1,
  )
  assert config.schedule.backbone_factor == 1


@pytest.mark.parametrize('name', CIFAR)
def test_the_cifar_transfer_is_the_published_one(name):
  config, card = load(name)
  model, data = name.rsplit('_', 1)
  assert (config.init_from, config.data.name) == (model, data)
  assert model in list_models(pretrained=True)
  assert f't2t-vit prepare {data} ' in card
  assert (config.data.train_split, config.data.eval_split) == ('train', 'test')
  assert (config.data.interpolation, config.data.crop_fraction) == ('bilinear', 1.0)
  assert config.data.mean == (0.4914, 0.4822, 0.4465)
  assert config.data.std == (0.2023, 0.1994, 0.2010)
  assert (config.optimizer.name, config.optimizer.momentum, config.schedule.backbone_factor) == ('sgd', 0.9, 0.01)
  assert config.schedule.granularity == 'epoch'
  augment = config.augment
  assert (augment.crop, augment.crop_padding, augment.horizontal_flip_probability) == ('padded', 28, 0.5)
  assert (augment.randaugment_operations, augment.mixup_alpha, augment.cutmix_alpha) == (0, 0, 0)
  assert (augment.random_erasing_probability, augment.label_smoothing, config.ema.decay) == (0, 0, 0)
  assert config.model.stochastic_depth_rate == 0.1


def test_every_model_and_every_published_result_has_a_config():
  assert set(NAMES) == {*PUBLISHED, 'digits', 'finetune'}
  assert set(list_models()) <= set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_cards_name_command_hardware_and_measurement(name):
  card = load(name)[1]
  command = 'python train.py\n' if name == 'digits' else f'python train.py --config=configs/{name}.py '
  assert command in card
  assert '\nHardware: ' in card
  measured = recipe_table.results(card)[1]
  assert measured == ('98.6 %' if name == 'digits' else 'nothing')


def test_the_page_of_recipes_is_up_to_date():
  page = recipe_table.PAGE.read_text()
  assert recipe_table.render(page) == page, 'run `python -m docs.recipe_table`'


TINY = {f'model.{field}': golden.TINY[field] for field in ('embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'token_dim')}


@pytest.mark.slow
def test_transfer_runs_on_small_data(tmp_path, data_dir, capsys):
  """The whole way, from converted weights of other classes to an accuracy, with a small model."""
  convert(golden.DATA / 'official_tiny_performer.pth.tar', tmp_path / 'weights', Options(settings={'num_heads': 4}))
  config, _ = load('t2t_vit_14_cifar10')
  data = {'data.name': 'digits', 'data.data_dir': data_dir}
  changes = {'data.image_size': 64, 'data.num_workers': 0, 'augment.crop_padding': 8, 'schedule.max_steps': 3}
  config.update_from_flattened_dict({'init_from': str(tmp_path / 'weights'), **TINY, **changes, **data})
  accuracy = loop.train(config, tmp_path / 'run')
  assert accuracy.count == 360
  rows = [json.loads(row) for row in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert {row['weights'] for row in rows if row['kind'] != 'train'} == {'raw'}
  assert rows[-2]['learning_rate'] == pytest.approx(0.05, rel=0.02)
  loop.train(config, tmp_path / 'run')
  assert 'This run is complete: 3 steps' in capsys.readouterr().out
