"""The soft split against torch's Unfold."""

import numpy as np
import pytest
import torch

from t2t_vit_jax import UserError
from t2t_vit_jax.models.soft_split import SPLITS, soft_split, token_grid


@pytest.mark.parametrize('split', SPLITS[:2])
@pytest.mark.parametrize('size', [(16, 16), (13, 22)])
def test_soft_split_equals_unfold(split, size, strict_dtypes):
  images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
  unfolded = torch.nn.functional.unfold(
    torch.from_numpy(images).permute(0, 3, 1, 2), split.kernel, stride=split.stride, padding=split.padding
  )
  patches = np.asarray(soft_split(images, split))
  height, width = (split.output_size(side) for side in size)
  assert patches.shape == (2, height, width, 3 * split.kernel**2)
  np.testing.assert_array_equal(patches.reshape(2, height * width, -1), unfolded.transpose(1, 2))


@pytest.mark.parametrize(
  ('image_size', 'grid'), [((224, 224), (14, 14)), ((384, 384), (24, 24)), ((64, 96), (4, 6)), ((3, 3), (1, 1))]
)
def test_token_grid(image_size, grid):
  assert token_grid(image_size) == grid


@pytest.mark.parametrize('image_size', [(2, 224), (224, 0)])
def test_images_too_small_are_refused(image_size):
  with pytest.raises(UserError, match=f'{image_size[0]} x {image_size[1]} px is too small: soft split 0'):
    token_grid(image_size)
