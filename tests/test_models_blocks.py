"""Stacking of blocks, by hand, and as the inverse of unstacking; and what a CPU stores between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2t_vit_jax import T2TViT
from t2t_vit_jax.models.blocks import stack_blocks, unstack_blocks, with_stored_gradient
from tests import golden


def test_all_blocks_but_the_last_are_stacked_in_their_order():
  state = {
    'params': {'head': np.float32(7), **{f'blocks_{number}': {'w': np.full(2, number)} for number in range(12)}},
    'opt_state': {'0': {'mu': {'blocks_0': np.zeros(3), 'blocks_1': np.ones(3)}, 'count': np.int32(4)}},
  }
  stacked = stack_blocks(state)
  assert set(stacked['params']) == {'head', 'blocks', 'blocks_11'}
  assert stacked['params']['blocks']['w'].tolist() == [[number] * 2 for number in range(11)]
  assert stacked['params']['head'] == 7
  assert stacked['opt_state']['0']['count'] == 4
  assert set(stacked['opt_state']['0']['mu']) == {'blocks', 'blocks_1'}
  assert stacked['opt_state']['0']['mu']['blocks'].shape == (1, 3)
  back = unstack_blocks(stacked)
  assert jax.tree.structure(back) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, back, state)
  jax.tree.map(np.testing.assert_array_equal, stack_blocks(stacked), stacked)
  jax.tree.map(np.testing.assert_array_equal, unstack_blocks(state), state)


def test_a_model_with_one_block_has_nothing_to_stack():
  model = T2TViT(10, 32, embed_dim=64, depth=1, num_heads=4, scan_blocks=True)
  images = jnp.ones((1, 32, 32, 3))
  variables = golden.random_variables(model, images)
  assert stack_blocks(variables).keys() == variables.keys()
  assert stack_blocks(variables)['params'].keys() == variables['params'].keys()
  np.testing.assert_array_equal(
    golden.apply(model, stack_blocks(variables), images),
    golden.apply(model.clone(scan_blocks=False), variables, images),
  )


@pytest.mark.slow
def test_each_block_adds_the_same_to_the_cost_of_gradients_on_a_cpu():
  """Were the gradient of the residual stream not stored, each block would add more than the one before."""
  model = T2TViT(10, 32, embed_dim=64, depth=1, num_heads=4)
  images = jnp.ones((4, 32, 32, 3))

  def traffic(depth):
    deep = model.clone(depth=depth)
    variables = jax.eval_shape(deep.init, jax.random.key(0), images)
    gradients = jax.jit(jax.grad(lambda variables: deep.apply(variables, images).sum()))
    return gradients.lower(variables).compile().cost_analysis()['bytes accessed']

  of_1, of_4, of_7 = (traffic(depth) for depth in (1, 4, 7))
  assert of_7 - of_4 == pytest.approx(of_4 - of_1, rel=0.02)


def test_storing_a_gradient_changes_no_value_and_no_program_for_other_devices():
  x = jnp.asarray([0.0, -0.0, jnp.inf, -jnp.inf, 1e-45, 3.0, jnp.nan], jnp.float32)
  for function in (with_stored_gradient, jax.vmap(with_stored_gradient)):
    result, tangent = jax.jvp(function, (jnp.ones(7),), (x,))
    (gradient,) = jax.vjp(function, jnp.ones(7))[1](x)
    assert result.tolist() == [1] * 7
    for y in (tangent, gradient, function(x)):
      np.testing.assert_array_equal(np.asarray(y).view(np.uint32), np.asarray(x).view(np.uint32))
  gradient = jax.jit(lambda x: jax.vjp(with_stored_gradient, x)[1](x))
  for platform, loops in (('cpu', True), ('tpu', False), ('cuda', False)):
    assert ('stablehlo.while' in gradient.trace(x).lower(lowering_platforms=(platform,)).as_text()) == loops
