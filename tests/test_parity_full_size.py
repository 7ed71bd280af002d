"""The JAX models against the PyTorch ones with the same random weights, and bfloat16 against float32.

Every named model with fewer blocks and on small images, then at full size. `-s` prints the figures of the latter.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

import t2t_vit_jax
from tests import golden, torch_reference

# Widths, heads and everything else are the named model's: only blocks, image size and classes are few.
SHORT = {
  name: (name, dict(dense_stages=(1, 1)) if name == 't2t_vit_dense' else dict(depth=2))
  for name in torch_reference.MODELS
}
SHORT['t2t_vit_7 with convolution tokens'] = ('t2t_vit_7', dict(depth=2, tokens_type='convolution'))
SHORT['t2t_vit_t_14 with biases and a scale'] = ('t2t_vit_t_14', dict(depth=2, qkv_bias=True, qk_scale=0.17))
FULL_SIZE = {name: (name, {}) for name in torch_reference.MODELS}
FULL_SIZE['t2t_vit_7 with convolution tokens'] = ('t2t_vit_7', dict(tokens_type='convolution'))


@dataclasses.dataclass
class Outcome:
  """Logits (B, num_classes), and gradients of the mean cross entropy, nested as the Flax model's parameters."""

  logits: np.ndarray
  gradients: Any


@dataclasses.dataclass
class Outcomes:
  """Float32 logits of two images; logits and gradients of the first one, whose derivatives take the time."""

  torch_logits: np.ndarray
  float32_logits: np.ndarray
  torch: Outcome
  bfloat16: Outcome


@pytest.fixture(name='outcomes', scope='module', params=FULL_SIZE.values(), ids=FULL_SIZE)
def fixture_outcomes(request):
  """What one model says of the same images and weights, computed three ways."""
  name, overrides = request.param
  images, label = random_images(224), np.array([3])
  torch_model, variables = random_model(name, images, **overrides)
  with torch.no_grad():
    torch_logits = torch_model(to_torch(images)).numpy()
  float32 = t2t_vit_jax.create_model(name, **overrides)
  # As a loop, which compiles in a fraction of the time: `test_named_models_with_few_blocks` has the other form.
  bfloat16 = float32.clone(dtype=jnp.bfloat16, scan_blocks=not float32.block_class.grows)
  outcomes = Outcomes(
    torch_logits=torch_logits,
    float32_logits=np.asarray(jax.jit(float32.apply)(variables, images)),
    torch=run_torch(torch_model, images[:1], label),
    bfloat16=run_jax(bfloat16, variables, images[:1], label),
  )
  print(f'\n{name} {overrides or ""}: float32 logits differ by', end='')
  print(f' {largest_difference(outcomes.float32_logits, outcomes.torch_logits):.1e}, bfloat16 logits by', end='')
  print(f' {largest_difference(outcomes.bfloat16.logits, outcomes.float32_logits[:1]):.1e}, gradients by', end='')
  print(f' {relative_difference(outcomes.bfloat16.gradients, outcomes.torch.gradients):.1e}')
  return outcomes


def random_model(name_or_arguments, images, **overrides):
  """A PyTorch model whose logits for `images` have standard deviation 1, and its weights as the Flax model's variables.

  The bounds on logits are absolute, and errors grow with the logits: their size must be fixed.
  """
  torch.manual_seed(0)
  model = torch_reference.create(name_or_arguments, **overrides).eval()
  fill_with_random_weights(model)
  with torch.no_grad():
    scale = model(to_torch(images)).std()
    for tensor in model.head.parameters():
      tensor /= scale
  return model, golden.to_variables({key: tensor.numpy() for key, tensor in model.state_dict().items()})


def random_images(side):
  """Two images with structure at three scales: to a model, pictures of pixel noise alone all look the same."""
  rng = np.random.default_rng(1)
  pixels, colours = rng.normal(size=(2, side, side, 3)), rng.normal(size=(2, 1, 1, 3))
  patches = rng.normal(size=(2, side // 16, side // 16, 3)).repeat(16, axis=1).repeat(16, axis=2)
  return (pixels / 2 + patches + colours).astype(np.float32)


def fill_with_random_weights(model):
  """Gives every trained tensor values that matter and keep activations, and logits, near 1."""
  for name, tensor in model.named_parameters():
    if not tensor.requires_grad:
      continue
    noise = torch.randn(tensor.shape)
    if 'norm' in name or 'cheap_operation' in name:
      tensor.data = 0.2 * noise + (1 if name.endswith('weight') else 0)
    elif name == 'cls_token' or name.endswith('bias'):
      tensor.data = 0.2 * noise
    else:
      tensor.data = gain(name) * noise / tensor[0].numel() ** 0.5


def gain(name):
  """Standard deviation of what a weight matrix makes of inputs of standard deviation 1."""
  if name.endswith('kqv.weight'):
    # exp(-|q|^2/2 - |k|^2/2) of longer queries and keys is lost beside the performer's 1e-8: no attention at all.
    return 0.2
  if '.se_layer.' in name:
    # Of its 672 ReLUs some are so near 0 that bfloat16 flips them. That jump of the gradient must not swamp the rest.
    return 0.5
  return 1


def to_torch(images):
  return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def run_torch(model, images, labels):
  logits = model(to_torch(images))
  functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
  gradients = {name: tensor.grad.numpy() for name, tensor in model.named_parameters() if tensor.requires_grad}
  return Outcome(logits.detach().numpy(), golden.to_variables(gradients)['params'])


def run_jax(model, variables, images, labels):
  (_, logits), gradients = golden.loss_and_gradients(model)(variables['params'], variables['frozen'], images, labels)
  return Outcome(np.asarray(logits), jax.device_get(gradients))


def largest_difference(logits, expected):
  return np.abs(logits - expected).max()


def relative_difference(gradients, expected):
  """Length of the difference of two gradients, each one vector of all parameters, relative to the expected one."""
  squares = jax.tree.map(lambda a, b: np.array([np.sum((a - b) ** 2), np.sum(b**2)], np.float64), gradients, expected)
  difference, length = np.sqrt(sum(jax.tree.leaves(squares)))
  return difference / length


@pytest.mark.parametrize(('name', 'overrides'), SHORT.values(), ids=SHORT)
def test_named_models_with_few_blocks(name, overrides):
  images, labels = random_images(64), np.array([3, 7])
  overrides = dict(overrides, image_size=64, num_classes=10)
  torch_model, variables = random_model(name, images, **overrides)
  expected = run_torch(torch_model, images, labels)
  actual = run_jax(t2t_vit_jax.create_model(name, **overrides), variables, images, labels)
  assert largest_difference(actual.logits, expected.logits) <= 1e-5
  for path, gradient in jax.tree.leaves_with_path(actual.gradients):
    wanted = functools.reduce(lambda node, key: node[key.key], path, expected.gradients)
    tolerance = 2e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
class TestFullSize:
  """All tests of one model share one computation."""

  def test_logits_have_the_size_that_the_bounds_mean_and_differ_between_images(self, outcomes):
    assert outcomes.torch_logits.std() == pytest.approx(1, abs=1e-3)
    assert largest_difference(*outcomes.torch_logits) > 0.3

  def test_float32_logits(self, outcomes):
    assert largest_difference(outcomes.float32_logits, outcomes.torch_logits) <= 1e-4

  def test_bfloat16_logits(self, outcomes):
    assert outcomes.bfloat16.logits.dtype == np.float32
    assert largest_difference(outcomes.bfloat16.logits, outcomes.float32_logits[:1]) <= 5e-2

  def test_bfloat16_gradients(self, outcomes):
    assert relative_difference(outcomes.bfloat16.gradients, outcomes.torch.gradients) <= 2e-2
