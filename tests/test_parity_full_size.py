"""Every named model at full size, with random weights: JAX against PyTorch, and bfloat16 against float32.

`pytest tests/test_parity_full_size.py -s` prints the figures of each model.
"""

import dataclasses
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional
import torch_reference

import t2t_vit_jax

pytestmark = pytest.mark.slow

CASES = {name: (name, {}) for name in torch_reference.MODELS}
CASES['t2t_vit_7 with convolution tokens'] = ('t2t_vit_7', dict(tokens_type='convolution'))


@dataclasses.dataclass
class Outcome:
  """Logits (B, num_classes), and gradients of the mean cross entropy, nested as the Flax model's parameters."""

  logits: np.ndarray
  gradients: Any


@dataclasses.dataclass
class Outcomes:
  torch: Outcome
  float32: Outcome
  bfloat16: Outcome


@pytest.fixture(name='outcomes', scope='module', params=CASES.values(), ids=CASES)
def fixture_outcomes(request):
  """What one model says of the same images and weights, computed three ways."""
  name, overrides = request.param
  torch_model = torch_reference.create(name, **overrides).eval()
  fill_with_random_weights(torch_model)
  images, labels = random_images(np.random.default_rng(1)), np.array([3, 997])
  variables = golden.to_variables({key: tensor.numpy() for key, tensor in torch_model.state_dict().items()})
  outcomes = Outcomes(
    torch=run_torch(torch_model, images, labels),
    float32=run_jax(t2t_vit_jax.create_model(name, **overrides), variables, images, labels),
    bfloat16=run_jax(t2t_vit_jax.create_model(name, dtype=jnp.bfloat16, **overrides), variables, images, labels),
  )
  logits = outcomes.torch.logits
  print(f'\n{name} {overrides or ""}: logits have std {logits.std():.2f}; ', end='')
  print(f'float32 logits {largest_difference(outcomes.float32.logits, logits):.1e}, ', end='')
  print(f'gradients {relative_difference(outcomes.float32.gradients, outcomes.torch.gradients):.1e}; ', end='')
  print(f'bfloat16 logits {largest_difference(outcomes.bfloat16.logits, outcomes.float32.logits):.1e}, ', end='')
  print(f'gradients {relative_difference(outcomes.bfloat16.gradients, outcomes.float32.gradients):.1e}')
  return outcomes


def random_images(rng):
  """Two images with structure at three scales: to a model, pictures of pixel noise alone all look the same."""
  pixels, patches, colours = rng.normal(size=(2, 224, 224, 3)), rng.normal(size=(2, 14, 14, 3)), rng.normal(size=(2, 3))
  patches = patches.repeat(16, axis=1).repeat(16, axis=2)
  return (pixels / 2 + patches + colours[:, None, None]).astype(np.float32)


def fill_with_random_weights(model):
  """Gives every trained tensor values that matter and keep activations, and logits, near 1."""
  rng = torch.Generator().manual_seed(0)
  for name, tensor in model.named_parameters():
    if not tensor.requires_grad:
      continue
    noise = torch.randn(tensor.shape, generator=rng)
    if 'norm' in name or 'cheap_operation' in name:
      value = 0.2 * noise + (1 if name.endswith('weight') else 0)
    elif name == 'cls_token' or name.endswith('bias'):
      value = 0.2 * noise
    elif name.endswith('kqv.weight'):
      # exp(-|q|^2/2 - |k|^2/2) of longer queries and keys is lost beside the performer's 1e-8: no attention at all.
      value = 0.2 * noise / tensor[0].numel() ** 0.5
    else:
      value = noise / tensor[0].numel() ** 0.5
    tensor.data = value


def run_torch(model, images, labels):
  logits = model(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
  functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
  gradients = {name: tensor.grad.numpy() for name, tensor in model.named_parameters() if tensor.requires_grad}
  return Outcome(logits.detach().numpy(), golden.to_variables(gradients)['params'])


def run_jax(model, variables, images, labels):
  def loss(params):
    logits = model.apply({**variables, 'params': params}, images)
    return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean(), logits

  gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(variables['params'])
  return Outcome(np.asarray(logits), jax.device_get(gradients))


def largest_difference(logits, expected):
  return np.abs(logits - expected).max()


def relative_difference(gradients, expected):
  """Length of the difference of two gradients, each one vector of all parameters, relative to the expected one."""
  squares = jax.tree.map(lambda a, b: np.array([np.sum((a - b) ** 2), np.sum(b**2)], np.float64), gradients, expected)
  difference, length = np.sqrt(sum(jax.tree.leaves(squares)))
  return difference / length


def test_logits_are_of_ordinary_size_and_differ_between_images(outcomes):
  assert 0.3 < outcomes.torch.logits.std() < 3
  assert largest_difference(*outcomes.torch.logits) > 0.3


def test_float32_logits(outcomes):
  assert largest_difference(outcomes.float32.logits, outcomes.torch.logits) <= 1e-4


def test_float32_gradients(outcomes):
  assert relative_difference(outcomes.float32.gradients, outcomes.torch.gradients) <= 1e-4


def test_bfloat16_logits(outcomes):
  assert outcomes.bfloat16.logits.dtype == np.float32
  assert largest_difference(outcomes.bfloat16.logits, outcomes.float32.logits) <= 5e-2


def test_bfloat16_gradients(outcomes):
  assert relative_difference(outcomes.bfloat16.gradients, outcomes.float32.gradients) <= 2e-2
