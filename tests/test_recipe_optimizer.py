"""Schedule and optimizer against timm's table and torch."""

import csv

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import configs.default
import configs.t2t_vit_14_cifar10
import t2t_vit_jax
from t2t_vit_jax import UserError
from t2t_vit_jax.conversion import names
from t2t_vit_jax.models.blocks import stack_blocks
from t2t_vit_jax.recipe import optimizer
from tests import golden
from tests.golden import DATA
from tests.parameters import slow


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


def test_the_two_learning_rates_of_the_cifar_transfer_are_torchs():
  """As the reference sets them up: one cosine for both groups, from each group's rate to the same end."""
  head, backbone = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
  sgd = torch.optim.SGD([{'params': [backbone], 'lr': 0.01 * 0.05}, {'params': [head]}], lr=0.05)
  cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, eta_min=2e-4, T_max=60)
  config = configs.t2t_vit_14_cifar10.get_config()
  schedules = [
    optimizer.learning_rate_schedule(
      config.schedule, steps_per_epoch=781, batch_size=config.data.batch_size, peak_factor=factor
    )
    for factor in (config.schedule.backbone_factor, 1.0)
  ]
  assert optimizer.total_steps(config.schedule, 781) == 60 * 781
  for epoch in range(60):
    for schedule, group in zip(schedules, sgd.param_groups, strict=True):
      assert float(schedule(781 * epoch + 780)) == pytest.approx(group['lr'], rel=1e-5)
    sgd.step()
    cosine.step()


def test_what_is_not_trained_has_no_learning_rate():
  schedule = optimizer.learning_rate_schedule(schedule_config(), steps_per_epoch=10, batch_size=512, peak_factor=0.0)
  assert [float(schedule(step)) for step in (0, 500, 3050)] == [0, 0, 0]


def test_max_steps_cuts_the_run():
  assert optimizer.total_steps(schedule_config(max_steps=7), 100) == 7
  assert optimizer.total_steps(schedule_config(epochs=2, cooldown_epochs=1), 100) == 300


@pytest.mark.parametrize(
  'name', ['t2t_vit_7', slow('t2t_vit_t_14'), 't2t_vit_14_se', slow('t2t_vit_16_ghost'), slow('t2t_vit_dense')]
)
def test_what_decays_is_what_has_two_axes_in_torch(name):
  model = t2t_vit_jax.create_model(name)
  params = golden.shapes_of(model, jnp.zeros((1, 64, 64, 3)))['params']
  for path, decays in jax.tree_util.tree_leaves_with_path(optimizer.weight_decay_mask(params)):
    leaf = path[-1].key
    assert leaf in ('kernel', 'bias', 'scale', 'cls_token')
    assert decays == (leaf == 'kernel'), path
  if name != 't2t_vit_dense':
    plain = stack_blocks(jax.tree.map(np.asarray, optimizer.weight_decay_mask(params)))
    stacked = optimizer.weight_decay_mask(jax.eval_shape(stack_blocks, params))
    jax.tree.map(lambda decays, each: np.testing.assert_array_equal(decays, each), stacked, plain)


ADAMW = dict(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.05)
SGD = dict(name='sgd', momentum=0.9, weight_decay=5e-4)
RATES = np.linspace(1e-3, 1e-2, 50)
BACKBONE_FACTOR = 0.5


def make_optimizer(dtype='float32', **changes):
  """Ours with `RATES` for the head and half of them for the rest."""
  config = configs.default.get_config().optimizer
  config.update(changes)
  return optimizer.make_optimizer(
    config,
    lambda step: jnp.asarray(RATES, dtype)[step],
    lambda step: jnp.asarray(BACKBONE_FACTOR * RATES, dtype)[step],
  )


class TorchOptimizer:
  """Torch's AdamW or SGD on named tensors: the same two rates, and no decay for what torch's users exempt in AdamW."""

  def __init__(self, name, parameters):
    self.parameters = {key: torch.nn.Parameter(tensor.clone()) for key, tensor in parameters.items()}
    groups = []
    for key, parameter in self.parameters.items():
      exempt = name == 'adamw' and (parameter.ndim <= 1 or key == 'cls_token')
      decay = {'weight_decay': 0.0} if exempt else {}
      groups.append({'params': [parameter], 'factor': 1.0 if key.startswith('head') else BACKBONE_FACTOR, **decay})
    if name == 'adamw':
      self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    else:
      self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=5e-4)

  def step(self, gradients, rate, clip_norm=0.0):
    for key, parameter in self.parameters.items():
      parameter.grad = gradients[key].clone()
    if clip_norm:
      torch.nn.utils.clip_grad_norm_(self.parameters.values(), clip_norm)
    for group in self.optimizer.param_groups:
      group['lr'] = float(rate) * group['factor']
    self.optimizer.step()


def to_torch(params):
  """Parameters of a performer model under torch's names and in torch's shapes."""
  tensors = {}
  for path, array in traverse_util.flatten_dict({'params': params}, sep='/').items():
    name, transform = names.to_torch(path, 'performer')
    tensors[name] = torch.from_numpy(transform.to_torch(np.asarray(array)).copy())
  return tensors


@pytest.mark.parametrize(('name', 'settings'), [('adamw', ADAMW), ('sgd', SGD)])
def test_fifty_steps_on_the_tiny_model_equal_torchs(name, settings):
  numbers = golden.load_numbers('tiny_performer')
  model = t2t_vit_jax.T2TViT(**golden.TINY_MODELS['performer'])
  variables = golden.load_variables('performer')
  start = to_torch(variables['params'])
  assert set(start) == {key.removeprefix('grad/') for key in numbers if key.startswith('grad/')}

  inputs = variables['frozen'], numbers['images_nhwc'], numbers['labels']
  ours, theirs = make_optimizer(**settings), TorchOptimizer(name, start)
  params = variables['params']
  state, losses = ours.init(params), []
  for rate in RATES:
    (loss, _), gradients = golden.loss_and_gradients(model)(params, *inputs)
    losses.append(float(loss))
    theirs.step(to_torch(gradients), rate)
    updates, state = jax.jit(ours.update)(gradients, state, params)
    params = optax.apply_updates(params, updates)
  assert losses[0] == pytest.approx(float(numbers['loss']), rel=1e-5)
  assert losses[-1] < 0.9 * losses[0]
  for key, tensor in to_torch(params).items():
    np.testing.assert_allclose(tensor, theirs.parameters[key].detach(), atol=2e-6, err_msg=key)
    assert not np.allclose(tensor, start[key], atol=2e-5), key


def random_gradients(dtype):
  rng = np.random.default_rng(0)
  start = {'head': rng.normal(size=(5, 4)), 'bias': rng.normal(size=4), 'cls_token': rng.normal(size=(1, 1, 3))}
  start = {name: value.astype(dtype) for name, value in start.items()}
  return start, [{name: rng.normal(size=value.shape).astype(dtype) for name, value in start.items()} for _ in RATES]


# In float32 optax rounds the bias corrections, which torch computes in double: hence the tolerances.
@pytest.mark.parametrize(
  ('name', 'dtype', 'clip_norm', 'atol'),
  [
    ('adamw', 'float64', 0.0, 1e-13),
    ('adamw', 'float32', 0.0, 5e-6),
    ('sgd', 'float64', 0.0, 1e-13),
    ('sgd', 'float32', 0.0, 1e-6),
    ('sgd', 'float64', 4.0, 1e-6),  # torch divides by the norm + 1e-6
    ('adamw', 'float64', 4.0, 1e-6),
  ],
)
def test_random_gradients_move_parameters_as_in_torch(name, dtype, clip_norm, atol):
  start, gradients = random_gradients(dtype)
  norms = [np.sqrt(sum((array**2).sum() for array in gradient.values())) for gradient in gradients]
  assert min(norms) < 4.0 < max(norms)  # some are clipped, some are not
  settings = {'adamw': ADAMW, 'sgd': SGD}[name]
  with jax.enable_x64(dtype == 'float64'):
    ours = make_optimizer(dtype, **settings, gradient_clip_norm=clip_norm)
    params = {key: jnp.asarray(value) for key, value in start.items()}
    state, update = ours.init(params), jax.jit(ours.update)
    for gradient in gradients:
      updates, state = update(gradient, state, params)
      params = optax.apply_updates(params, updates)
  theirs = TorchOptimizer(name, {key: torch.from_numpy(value) for key, value in start.items()})
  for gradient, rate in zip(gradients, RATES, strict=True):
    theirs.step({key: torch.from_numpy(value) for key, value in gradient.items()}, rate, clip_norm)
  for key, parameter in theirs.parameters.items():
    assert params[key].dtype == dtype
    np.testing.assert_allclose(params[key], parameter.detach(), atol=atol)


def test_unknown_optimizer_is_refused():
  with pytest.raises(UserError, match=r"optimizer\.name must be 'adamw' or 'sgd', not 'adam'"):
    make_optimizer(name='adam')
