"""T2T-ViT in JAX and Flax: Tokens-to-Token Vision Transformers (arXiv 2101.11986)."""

import importlib
from typing import TYPE_CHECKING, Any

from t2t_vit_jax import interrupts  # noqa: F401 (first: the rest takes seconds)

if TYPE_CHECKING:
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
# Where the public names come from: jax and Flax are imported with the first of them, so that programs start at once.
_MODULES = ('errors', 'models.variants', 'models.t2t_vit', 'models.feature_pyramid', 'conversion')


def __getattr__(name: str) -> Any:
  """Imports what has the public name, or the subpackage `models` or `conversion`, when it is first used."""
  if name in ('models', 'conversion'):
    return importlib.import_module(f'{__name__}.{name}')
  if name in __all__:
    for module in map(importlib.import_module, (f'{__name__}.{module}' for module in _MODULES)):
      if name in vars(module):
        return vars(module)[name]
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
