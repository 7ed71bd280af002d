"""Layers against hand-computed values and golden files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from t2t_vit_jax.models import layers


def test_gelu_is_the_exact_form():
  x = np.linspace(-6, 6, 1001, dtype=np.float32)
  np.testing.assert_allclose(layers.gelu(x), torch.nn.functional.gelu(torch.from_numpy(x)), atol=1e-6)


@pytest.mark.parametrize('offset', [0.0, 1000.0])
def test_layer_norm_equals_torch(offset):
  x = np.random.default_rng(0).normal(offset, 1, size=(4, 147)).astype(np.float32)
  norm = layers.LayerNorm()
  variables = norm.init(jax.random.key(0), x)
  expected = torch.nn.functional.layer_norm(torch.from_numpy(x).double(), (147,), eps=1e-5)
  np.testing.assert_allclose(norm.apply(variables, x), expected, atol=1e-6 if offset == 0 else 1e-3)


def half_layer_norm_and_gradients(x, scale, bias, cotangent):
  """Of bfloat16 results, in order: results, and gradients of x, scale and bias."""
  results, gradients_of = jax.vjp(lambda *given: layers.half_layer_norm(1e-5, jnp.bfloat16, *given), x, scale, bias)
  return results, *gradients_of(cotangent)


@pytest.mark.parametrize('offset', [0.0, 30.0])
def test_half_layer_norm_and_its_gradients_are_as_exact_as_bfloat16(offset):
  rng = np.random.default_rng(0)
  x = rng.normal(offset, 1, size=(64, 147)).astype(np.float32)
  scale, bias = rng.normal(1, 0.3, size=(2, 1, 147)).astype(np.float32)
  cotangent = jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16)
  leaves = [torch.from_numpy(array).double().requires_grad_() for array in (x, scale, bias)]
  expected = torch.nn.functional.layer_norm(leaves[0], (147,), eps=1e-5) * leaves[1] + leaves[2]
  expected.backward(torch.from_numpy(np.asarray(cotangent, np.float64)))
  found = half_layer_norm_and_gradients(x, scale, bias, cotangent)
  assert found[0].dtype == jnp.bfloat16
  for mine, theirs in zip(found, [expected.detach(), *(leaf.grad for leaf in leaves)], strict=True):
    assert np.abs(np.asarray(mine, np.float64) - theirs.numpy()).max() <= 2**-8 * np.abs(theirs.numpy()).max()


def test_half_layer_norm_of_a_constant_is_the_bias_and_has_finite_gradients():
  x, scale, bias = jnp.full((2, 8), 300.0), jnp.ones((1, 8)), jnp.full((1, 8), 0.5)
  results, *gradients = half_layer_norm_and_gradients(x, scale, bias, jnp.ones((2, 8), jnp.bfloat16))
  np.testing.assert_array_equal(results, 0.5)
  assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_half_layer_norm_can_be_differentiated_in_forward_mode():
  x, scale, bias = (np.random.default_rng(i).normal(size=(4, 16)).astype(np.float32) for i in range(3))
  function = functools.partial(layers.half_layer_norm, 1e-5, jnp.bfloat16, scale=scale, bias=bias)
  direction = np.random.default_rng(3).normal(size=x.shape).astype(np.float32)
  cotangent = jnp.asarray(np.random.default_rng(4).normal(size=x.shape), jnp.bfloat16)
  forward = jnp.vdot(np.float32(jax.jvp(function, (x,), (direction,))[1]), np.float32(cotangent))
  (gradient,) = jax.vjp(function, x)[1](cotangent)
  assert forward == pytest.approx(float(jnp.vdot(gradient, direction)), rel=2e-2)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_expectation():
  rate, samples = 0.25, 20_000
  branch = jnp.broadcast_to(jnp.arange(1.0, 7.0).reshape(1, 2, 3), (samples, 2, 3))
  layer = layers.StochasticDepth(rate)
  kept = np.asarray(layer.apply({}, branch, train=True, rngs={'dropout': jax.random.key(0)}) / branch)
  np.testing.assert_array_equal(kept, np.broadcast_to(kept[:, :1, :1], kept.shape))
  assert set(np.unique(kept.round(6))) == {0, np.float32(1 / (1 - rate)).round(6)}
  assert np.mean(kept[:, 0, 0] > 0) == pytest.approx(1 - rate, abs=4 * np.sqrt(rate * (1 - rate) / samples))
  np.testing.assert_array_equal(layer.apply({}, branch, train=False), branch)


def test_the_gradient_of_a_bias_is_summed_in_float32():
  """In bfloat16 a sum of ones ends at 256."""
  layer, x = layers.Dense(2, dtype=jnp.bfloat16), jnp.ones((2, 1003, 4))
  params = layer.init(jax.random.key(0), x)
  gradient = jax.grad(lambda params: layer.apply(params, x).astype(jnp.float32).sum())(params)
  np.testing.assert_array_equal(gradient['params']['bias'], 2006)


def test_dense_weights_start_from_a_normal_of_std_002():
  kernel = np.asarray(layers.Dense(512).init(jax.random.key(0), jnp.zeros((1, 512)))['params']['kernel'])
  assert kernel.std() == pytest.approx(0.02, rel=0.01)
  assert np.abs(kernel).max() > 0.07  # not truncated at two deviations


def test_torch_conv_init_is_uniform_within_its_bound():
  values = np.asarray(layers.torch_conv_init(fan_in=147)(jax.random.key(0), (7, 7, 3, 200)))
  bound = 147**-0.5
  assert np.abs(values).max() <= bound
  assert values.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)
