"""The training and evaluation steps as pure functions."""

import collections
import re

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import pytest

import configs.default
import t2t_vit_jax
from t2t_vit_jax.models.preprocessing import Normalization
from t2t_vit_jax.recipe import optimizer, steps
from t2t_vit_jax.recipe.augment import BatchAugmentation, Mixing, RandomErasing
from t2t_vit_jax.recipe.evaluation import Accuracy, run_batches, score
from t2t_vit_jax.recipe.sharding import make_mesh, replicated, to_devices
from t2t_vit_jax.recipe.state import init_state

IDENTITY = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
PLAIN = BatchAugmentation(10, 0.1, Mixing(0.0, 0.0, 0.0, 1), IDENTITY, RandomErasing(0.0, (0.0, 0.0), (1.0, 1.0)))

MIXED = BatchAugmentation(
  10, 0.1, Mixing(0.8, 1.0, 0.5, 4), Normalization((0.5,) * 3, (0.2,) * 3), RandomErasing(0.5, (0.02, 0.3), (0.3, 3.0))
)


@pytest.fixture(scope='module')
def model():
  return t2t_vit_jax.create_model('t2t_vit_tiny', num_classes=10, depth=1, performer_dropout_rate=0.0)


def fresh_state(model, tx, *, with_ema):
  return jax.jit(lambda rng: init_state(model, tx, rng, 32, with_ema=with_ema))(jax.random.key(0))


def random_batch(size, seed=0):
  rng = np.random.default_rng(seed)
  return {
    'image': rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8),
    'label': rng.integers(0, 10, size, dtype=np.int32),
    'mask': np.ones(size, np.float32),
  }


@pytest.mark.slow
def test_one_step_is_plain_gradient_descent_when_the_optimizer_is(model):
  sgd = optax.sgd(0.1)
  state = fresh_state(model, sgd, with_ema=True)
  step = steps.make_train_step(model, sgd, lambda count: 0.1, augmentation=PLAIN, ema_decay=0.9)
  batch = random_batch(4)

  def loss_of(params):
    logits = model.apply({'params': params, 'frozen': state.frozen}, batch['image'].astype(np.float32) / 255)
    log_probabilities = jax.nn.log_softmax(logits)
    targets = np.full((4, 10), 0.01)
    targets[np.arange(4), batch['label']] += 0.9
    return -(targets * log_probabilities).sum(axis=1).mean()

  expected_loss, gradients = jax.jit(jax.value_and_grad(loss_of))(state.params)
  after, metrics = jax.jit(step)(state, batch, jax.random.key(1))
  assert float(metrics['loss']) == pytest.approx(float(expected_loss), rel=1e-5)
  assert int(after.step) == 1
  moved = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)
  averaged = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state.params, moved)
  for tree, expected in ((after.params, moved), (after.ema, averaged)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tree, expected)
  jax.tree.map(np.testing.assert_array_equal, after.frozen, state.frozen)


def test_steps_draw_other_dropout_masks_and_move_the_average():
  model = t2t_vit_jax.create_model('t2t_vit_tiny', num_classes=10, depth=1, dropout_rate=0.5)
  still = optax.set_to_zero()
  state = fresh_state(model, still, with_ema=True)
  state = state.replace(ema=jax.tree.map(jnp.zeros_like, state.params))
  step = jax.jit(steps.make_train_step(model, still, lambda _: 0.0, augmentation=PLAIN, ema_decay=0.9))
  batch = random_batch(4)
  next_state, first = step(state, batch, jax.random.key(1))
  _, again = step(state, batch, jax.random.key(1))
  _, second = step(next_state, batch, jax.random.key(1))
  assert float(first['loss']) == float(again['loss'])
  assert float(first['loss']) != float(second['loss'])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.1 * b, rtol=1e-5), next_state.ema, state.params)


def test_frozen_variables_are_not_in_the_optimizer(model):
  adamw = optimizer.make_optimizer(configs.default.get_config().optimizer, lambda _: 1e-3, lambda _: 1e-3)
  state = fresh_state(model, adamw, with_ema=False)
  names = {str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}
  assert not any('pos_embed' in name or 'random_projection' in name for name in names)
  assert state.ema == {}


def compile_step(num_devices, **arguments):
  """A step with all of the augmentation, compiled as in a run, and what it takes: a state, a batch and a key."""
  model = t2t_vit_jax.create_model('t2t_vit_tiny', num_classes=10, depth=1, tokens_type='convolution')
  mesh = make_mesh(ConfigDict(dict(data=num_devices, fsdp=1)))
  sgd = optax.sgd(0.1, momentum=0.9)
  step = steps.make_train_step(model, sgd, lambda _: 0.1, augmentation=MIXED, ema_decay=0.9, **arguments)
  batch = random_batch(32)
  inputs = (
    jax.device_put(fresh_state(model, sgd, with_ema=True), replicated(mesh)),
    to_devices({name: batch[name] for name in ('image', 'label')}, mesh),
    jax.device_put(jax.random.key(1), replicated(mesh)),
  )
  return jax.jit(step, out_shardings=replicated(mesh)).lower(*inputs).compile(), inputs


@pytest.fixture(name='four_parts', scope='module')
def fixture_four_parts():
  """The step on two devices, in four micro-batches."""
  return compile_step(2, accumulate_steps=4)


@pytest.mark.slow
def test_accumulating_equals_the_large_batch(four_parts):
  whole, inputs = compile_step(1)
  expected, expected_metrics = jax.device_get(whole(*inputs))
  moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), expected.params, jax.device_get(inputs[0].params))
  assert max(jax.tree.leaves(moved)) > 1e-3
  for parts, inputs in (four_parts, compile_step(1, accumulate_steps=8)):
    found, metrics = jax.device_get(parts(*inputs))
    assert int(found.step) == int(expected.step) == 1
    for name in metrics:
      assert float(metrics[name]) == pytest.approx(float(expected_metrics[name]), rel=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


@pytest.mark.slow
def test_accumulating_needs_less_memory_and_moves_no_image_between_devices(four_parts):
  compiled = compile_step(2)[0], four_parts[0]
  kinds = [
    collections.Counter(re.findall(r' (all-reduce|all-gather|all-to-all|collective-permute)', program.as_text()))
    for program in compiled
  ]
  assert kinds[0]['all-reduce'] > 0
  assert kinds[0] == kinds[1]
  memory = [program.memory_analysis().temp_size_in_bytes for program in compiled]
  assert memory[1] < 0.5 * memory[0]


def test_micro_batches_have_whole_groups_of_every_devices_images():
  dealt = steps.micro_batches({'position': jnp.arange(16)}, 2, 4)['position']
  np.testing.assert_array_equal(dealt, [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]])
  dealt = steps.micro_batches({'position': jnp.arange(6)}, 3, 1)['position']
  np.testing.assert_array_equal(dealt, [[0, 3], [1, 4], [2, 5]])


@pytest.mark.slow
def test_micro_batches_have_other_dropout_masks():
  model = t2t_vit_jax.create_model('t2t_vit_tiny', num_classes=10, depth=1, dropout_rate=0.5)
  still = optax.set_to_zero()
  state = fresh_state(model, still, with_ema=False)
  batch = random_batch(2)
  pairs = {name: np.repeat(array, 2, axis=0) for name, array in batch.items()}  # either half is `batch`
  losses = []
  for images, count in ((batch, 1), (pairs, 2)):
    step = steps.make_train_step(model, still, lambda _: 0.0, augmentation=PLAIN, ema_decay=0.0, accumulate_steps=count)
    losses.append(float(jax.jit(step)(state, images, jax.random.key(1))[1]['loss']))
  assert abs(losses[0] - losses[1]) > 1e-3


def test_a_linear_probe_trains_the_head_alone(model):
  config = configs.default.get_config()
  schedules = [
    optimizer.learning_rate_schedule(config.schedule, steps_per_epoch=1, batch_size=512, peak_factor=factor)
    for factor in (1.0, 0.0)
  ]
  adamw = optimizer.make_optimizer(config.optimizer, *schedules)
  state = fresh_state(model, adamw, with_ema=False)
  for head_only in (False, True):
    step = jax.jit(
      steps.make_train_step(model, adamw, schedules[0], augmentation=PLAIN, ema_decay=0.0, head_only=head_only)
    )
    after, metrics = step(state, random_batch(4), jax.random.key(1))
    for name, params in after.params.items():
      for old, new in zip(jax.tree.leaves(state.params[name]), jax.tree.leaves(params), strict=True):
        assert np.array_equal(old, new) == (name != 'head')
    gradients = jax.tree.map(lambda first_moment: first_moment / 0.1, after.opt_state[1][0].mu)  # beta1 is 0.9
    assert float(metrics['gradient_norm']) == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)
    del gradients['head']
    assert (float(optax.tree.norm(gradients)) == 0) == head_only


def test_evaluation_sums_ignore_padding_and_batch_size(model):
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  data = random_batch(23)
  logits = np.asarray(jax.jit(model.apply)(variables, data['image'].astype(np.float32) / 255))
  order = np.argsort(-logits, axis=1)
  expected = Accuracy(
    correct=int((order[:, 0] == data['label']).sum()),
    correct_top5=int((order[:, :5] == data['label'][:, None]).sum()),
    count=23,
    loss_sum=float(-jax.nn.log_softmax(logits)[np.arange(23), data['label']].sum()),
  )
  # Padding would be counted as right, too, if anything but its mask decided.
  guess = int(jax.jit(model.apply)(variables, jnp.zeros((1, 32, 32, 3)))[0].argmax())
  mesh = make_mesh(ConfigDict(dict(data=2, fsdp=1)))
  eval_step = jax.jit(steps.make_eval_step(model, normalization=IDENTITY))
  for batch_size in (2, 8, 24):
    batches = []
    for start in range(0, 23, batch_size):
      part = {name: array[start : start + batch_size] for name, array in data.items()}
      missing = batch_size - len(part['label'])
      batches.append(
        {
          name: np.concatenate([array, np.full_like(data[name][:missing], guess if name == 'label' else 0)])
          for name, array in part.items()
        }
      )
    outcomes, labels = run_batches(eval_step, {'raw': variables}, batches, mesh)
    outcome = {name: array[:23] for name, array in outcomes['raw'].items()}
    found = score(labels[:23], **outcome).accuracy([''] * model.num_classes)
    assert (found.correct, found.correct_top5, found.count) == (expected.correct, expected.correct_top5, 23)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    right = order[:, 0] == data['label']
    assert found.class_count == tuple(np.bincount(data['label'], minlength=model.num_classes))
    assert found.class_correct == tuple(np.bincount(data['label'], right, minlength=model.num_classes))
