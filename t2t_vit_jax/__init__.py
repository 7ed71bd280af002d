"""T2T-ViT in JAX and Flax: Tokens-to-Token Vision Transformers (arXiv 2101.11986)."""

from t2t_vit_jax import interrupts  # noqa: F401 (first: the rest takes seconds)
from t2t_vit_jax.conversion import find_weights, load_pretrained
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.feature_pyramid import FeaturePyramid, feature_pyramid
from t2t_vit_jax.models.t2t_vit import Features, HeadLogits, T2TViT
from t2t_vit_jax.models.variants import create_model, list_models

__version__ = '0.1.0'
__all__ = [
  'FeaturePyramid',
  'Features',
  'HeadLogits',
  'T2TViT',
  'UserError',
  'create_model',
  'feature_pyramid',
  'find_weights',
  'list_models',
  'load_pretrained',
]
