"""Device-side preparation of a batch, by hand."""

import numpy as np

from t2t_vit_jax.training import augment


def test_normalization_by_hand():
  images = np.array([[[[0, 51, 255]]]], np.uint8)
  normalized = augment.Normalization((0.5, 0.2, 0.0), (0.5, 0.1, 2.0))(images)
  np.testing.assert_allclose(normalized, [[[[-1.0, 0.0, 0.5]]]], atol=1e-6)


def test_soft_targets_by_hand():
  targets = augment.soft_targets(np.array([2]), num_classes=4, label_smoothing=0.1)
  np.testing.assert_allclose(targets, [[0.025, 0.025, 0.925, 0.025]], rtol=1e-6)
