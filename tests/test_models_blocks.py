"""Stacking of blocks, by hand, and as the inverse of unstacking."""

import jax
import jax.numpy as jnp
import numpy as np

from t2t_vit_jax import T2TViT
from t2t_vit_jax.models.blocks import stack_blocks, unstack_blocks
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
