"""The count of products, on programs counted by hand."""

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from t2t_vit_jax.planning.flops import count_flops


def described(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_batched_products():
  function = jax.jit(lambda x, y: jnp.einsum('bij,bjk->bik', x, y))
  assert count_flops(function, described(3, 4, 5), described(3, 5, 6)) == 2 * 3 * 4 * 5 * 6


def test_a_loop_counts_as_often_as_it_runs():
  def loop(x, w):
    return lax.scan(lambda x, _: (jax.jit(jnp.dot)(x, w), None), x, length=7)[0]

  assert count_flops(jax.jit(loop), described(4, 5), described(5, 5)) == 7 * 2 * 4 * 5 * 5


def test_map_in_chunks_counts_the_rest_too():
  def rows(x, w):
    return lax.map(lambda row: row @ w, x, batch_size=4)  # 10 rows: two chunks and two more

  assert count_flops(jax.jit(rows), described(10, 5), described(5, 6)) == 2 * 10 * 5 * 6


def test_gradients_and_recomputation():
  def loss(w, x):
    return jnp.sin(jnp.sin(x @ w) @ w).sum()

  product = 2 * 4 * 5 * 5
  w, x = described(5, 5), described(4, 5)
  assert count_flops(jax.jit(loss), w, x) == 2 * product
  # Of the second product two gradients, of the first that of w alone.
  assert count_flops(jax.jit(jax.grad(loss)), w, x) == (2 + 3) * product
  remat = jax.checkpoint(loss, policy=jax.checkpoint_policies.nothing_saveable)
  assert count_flops(jax.jit(jax.grad(remat)), w, x) == (2 + 3) * product + count_flops(jax.jit(loss), w, x)


def convolution(x, w, **options):
  return lax.conv_general_dilated(x, w, dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **options)


@pytest.mark.parametrize(
  ('options', 'channels', 'pairs'),
  [
    # Products of an output position with a place of the kernel that is inside of the image, in one direction.
    (dict(window_strides=(1, 1), padding='VALID'), 2, 6 * 3),
    (dict(window_strides=(2, 2), padding='VALID'), 2, 3 * 3),
    (dict(window_strides=(1, 1), padding='SAME'), 2, 8 * 3 - 2),
    (dict(window_strides=(4, 4), padding=((2, 2), (2, 2))), 2, 1 + 3 + 2),  # the kernel starts at -2, 2 and 6
    (dict(window_strides=(1, 1), padding='VALID', feature_group_count=2), 1, 6 * 3),
    (dict(window_strides=(1, 1), padding='VALID', rhs_dilation=(2, 2)), 2, 4 * 3),
    (dict(window_strides=(1, 1), padding=((0, 0), (0, 0)), lhs_dilation=(2, 2)), 2, 7 * 2 + 6 * 1),
  ],
)
def test_convolutions(options, channels, pairs):
  function = jax.jit(lambda x, w: convolution(x, w, **options))
  count = count_flops(function, described(5, 8, 8, 2), described(3, 3, channels, 6))
  assert count == 2 * 5 * 6 * channels * pairs**2


def test_the_gradients_of_a_convolution_cost_as_much_as_itself():
  def loss(w, x):
    return (convolution(jnp.sin(x), w, window_strides=(2, 2), padding='SAME') ** 2).sum()

  w, x = described(3, 3, 2, 6), described(5, 8, 8, 2)
  forward = count_flops(jax.jit(loss), w, x)
  assert count_flops(jax.jit(jax.grad(loss)), w, x) == 2 * forward
  assert count_flops(jax.jit(jax.grad(loss, argnums=(0, 1))), w, x) == 3 * forward
