"""Layers of every patch, computed without patches, against torch in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from t2t_vit_jax.models.patch_layers import patch_norm_dense
from t2t_vit_jax.models.soft_split import SPLITS, Split


def oracle(x, split, norm, dense):
  """Dense(LayerNorm(patches)) by torch in float64; returns a tensor that knows its gradient."""
  patches = torch.nn.functional.unfold(x.permute(0, 3, 1, 2), split.kernel, stride=split.stride, padding=split.padding)
  patches = patches.transpose(1, 2)
  normalised = torch.nn.functional.layer_norm(patches, patches.shape[-1:], norm['scale'], norm['bias'], eps=1e-5)
  height, width = (split.output_size(side) for side in x.shape[1:3])
  return (normalised @ dense['kernel'] + dense['bias']).reshape(len(x), height, width, -1)


def half_flat(x):
  """The left half constant, near the mean of the rest but not equal to it."""
  x[:, :, : x.shape[2] // 2] = x.mean() + 0.7
  return x


INPUTS = {
  'noise': lambda x: x,
  'constant': lambda x: np.full_like(x, 0.3),
  'half constant': half_flat,
  'large offset': lambda x: x + 1000,
}


@functools.partial(jax.jit, static_argnums=0)
def projections_and_gradients(split, cotangent, *inputs):
  """The three projections of `patch_norm_dense`, side by side, and the gradients of all its inputs."""

  def projections(x, norm, dense):
    return jnp.concatenate(patch_norm_dense(x, split, norm, dense, 3, dtype=jnp.float32), axis=-1)

  result, pull_back = jax.vjp(projections, *inputs)
  return result, pull_back(cotangent)


@pytest.mark.parametrize('kind', INPUTS)
@pytest.mark.parametrize(('split', 'channels'), [(SPLITS[0], 3), (SPLITS[1], 16)])
@pytest.mark.parametrize('size', [(32, 32), (29, 46)])
def test_conv_form_equals_a_float64_oracle(split, channels, size, kind, strict_dtypes):
  rng = np.random.default_rng(0)
  x = INPUTS[kind](rng.normal(size=(2, *size, channels))).astype(np.float32)
  patch_dim = channels * split.kernel**2
  norm = {'scale': rng.normal(1, 0.2, patch_dim), 'bias': rng.normal(0, 0.2, patch_dim)}
  dense = {'kernel': rng.normal(size=(patch_dim, 24)) / patch_dim**0.5, 'bias': rng.normal(0, 0.2, 24)}
  norm, dense = jax.tree.map(np.float32, (norm, dense))
  inputs = (x, norm, dense)

  wide = jax.tree.map(lambda a: torch.from_numpy(a).double().requires_grad_(), inputs)
  expected = oracle(wide[0], split, *wide[1:])
  cotangent = rng.normal(size=expected.shape).astype(np.float32)
  expected.backward(torch.from_numpy(cotangent).double())

  actual, gradients = projections_and_gradients(split, cotangent, *inputs)
  np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=0, atol=1e-5)
  for gradient, tensor in zip(jax.tree.leaves(gradients), jax.tree.leaves(wide), strict=True):
    wanted = tensor.grad.numpy()
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize('kind', ['noise', 'half constant', 'smooth'])
@pytest.mark.parametrize(('split', 'channels', 'image_dtype'), [(SPLITS[0], 3, 'float32'), (SPLITS[1], 16, 'bfloat16')])
def test_conv_form_in_bfloat16_is_as_exact_as_patches(split, channels, image_dtype, kind):
  """Nearly flat patches far from 0 are the hard ones, as in a photograph's sky: 0.02 around 2, say."""
  rng = np.random.default_rng(0)
  inputs = {**INPUTS, 'smooth': lambda x: 2 + 0.02 * x}
  x = jnp.asarray(inputs[kind](rng.normal(size=(2, 32, 32, channels))), image_dtype)
  patch_dim = channels * split.kernel**2
  norm = {'scale': rng.normal(1, 0.2, patch_dim), 'bias': rng.normal(0, 0.2, patch_dim)}
  dense = {'kernel': rng.normal(size=(patch_dim, 24)) / patch_dim**0.5, 'bias': rng.normal(0, 0.2, 24)}
  norm, dense = jax.tree.map(np.float32, (norm, dense))
  expected = oracle(*jax.tree.map(lambda a: torch.from_numpy(np.asarray(a, np.float64)), (x,)), split, *jax.tree.map(
    lambda a: torch.from_numpy(a).double(), (norm, dense)
  )).numpy()  # fmt: skip

  def largest_error(form):
    result = jnp.concatenate(patch_norm_dense(x, split, norm, dense, 3, form=form, dtype=jnp.bfloat16), axis=-1)
    return np.abs(np.asarray(result, np.float64) - expected).max()

  assert largest_error('conv') <= 1.5 * largest_error('patches')


def test_flat_images_far_from_zero_are_finite_in_bfloat16():
  x = np.full((1, 16, 16, 3), 1000, np.float32)  # whose variance is 0, and as a mean of squares rounds to less
  norm = {'scale': np.ones(147, np.float32), 'bias': np.zeros(147, np.float32)}
  dense = {'kernel': np.ones((147, 3), np.float32) / 147}
  result = patch_norm_dense(x, SPLITS[0], norm, dense, 3, dtype=jnp.bfloat16)
  assert all(np.isfinite(np.asarray(part, np.float32)).all() for part in result)


def test_a_geometry_that_the_cells_do_not_fit_is_refused():
  x, norm = jnp.zeros((1, 8, 8, 1)), {'scale': jnp.ones(16), 'bias': jnp.zeros(16)}
  with pytest.raises(AssertionError, match='must lie in 2 x 2 cells'):
    patch_norm_dense(x, Split(4, 2, 1), norm, {'kernel': jnp.ones((16, 3))}, 3, dtype=jnp.float32)
