"""The encoder's own derivatives, and results of some tokens only."""

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from t2t_vit_jax.models.block_variants import BLOCK_TYPES
from t2t_vit_jax.models.encoder import project_to_heads
from tests import golden
from tests.parameters import slow


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_projections_are_the_parts_of_the_joint_product():
  x, kernel = normal(2, 5, 6), normal(6, 3, 2, 4, seed=1)
  joint = np.einsum('btd,dphe->pbthe', x, kernel)
  np.testing.assert_allclose(project_to_heads(x, kernel), joint, atol=1e-5)


@pytest.mark.parametrize('parts', [1, 3])
def test_projections_have_the_derivatives_of_finite_differences(parts):
  """To the second order, in forward and reverse mode."""
  with jax.enable_x64(True):
    x, kernel = np.float64(normal(2, 5, 6)), np.float64(normal(6, parts, 2, 4, seed=1))
    check_grads(lambda x, kernel: [jnp.sin(y) for y in project_to_heads(x, kernel)], (x, kernel), order=2, rtol=1e-5)


@pytest.mark.parametrize('block_type', ['standard', slow('se'), slow('ghost'), 'dense'])
@pytest.mark.parametrize('qkv_bias', [slow(False), True])
def test_the_first_tokens_alone_are_those_of_all_with_their_gradients(block_type, qkv_bias):
  block = BLOCK_TYPES[block_type].block(num_heads=2, mlp_ratio=3, qkv_bias=qkv_bias)
  x = normal(3, 7, 16)
  variables = golden.random_variables(block, x)

  def loss(variables, x, num_outputs):
    y = block.apply(variables, x, False, num_outputs)[:, :2]
    return (y * normal(*y.shape, seed=3)).sum(), y

  loss_and_gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
  (_, some), gradients = loss_and_gradients(variables, x, 2)
  (_, of_all), expected = loss_and_gradients(variables, x, None)
  np.testing.assert_allclose(some, of_all, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradients, expected)
