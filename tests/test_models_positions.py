"""The table of positions against the reference's, torch's and values computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from t2t_vit_jax.models import positions
from tests import golden


def test_sinusoidal_table_equals_the_references():
  table = positions.sinusoidal_position_embedding(197, 384)
  assert table.shape == (1, 197, 384)
  assert table.dtype == np.float32
  np.testing.assert_array_equal(table[0], golden.load_numbers('pos_embed_resize')['sinusoid_197_384'])


def test_sinusoidal_table_by_hand():
  table = positions.sinusoidal_position_embedding(3, 4)[0]
  np.testing.assert_allclose(table[0], [0, 1, 0, 1])
  np.testing.assert_allclose(table[2], [np.sin(2), np.cos(2), np.sin(0.02), np.cos(0.02)], rtol=1e-6)


@pytest.mark.parametrize('side', [8, 24])
def test_position_table_is_resized_like_the_reference_does(side):
  numbers = golden.load_numbers('pos_embed_resize')
  resized = positions.resize_position_embedding(numbers['old'], (14, 14), (side, side))
  np.testing.assert_allclose(resized, numbers[f'new_{side}'], atol=1e-5)
  np.testing.assert_array_equal(resized[:, 0], numbers['old'][:, 0])


def test_position_table_resize_to_a_non_square_grid_equals_torch():
  table = np.random.default_rng(0).normal(size=(1, 1 + 4 * 6, 5)).astype(np.float32)
  grid = torch.from_numpy(table[:, 1:]).reshape(1, 4, 6, 5).permute(0, 3, 1, 2)
  expected = torch.nn.functional.interpolate(grid, size=(7, 3), mode='bicubic', align_corners=False)
  resized = positions.resize_position_embedding(jnp.asarray(table), (4, 6), (7, 3))
  np.testing.assert_allclose(resized[0, 1:].reshape(7, 3, 5), expected[0].permute(1, 2, 0), atol=1e-5)
