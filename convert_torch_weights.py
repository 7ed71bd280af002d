"""Converts PyTorch weights like `python -m t2t_vit_jax.conversion`, also from a checkout that is not installed."""

import sys

from t2t_vit_jax.conversion.__main__ import main

if __name__ == '__main__':
  sys.exit(main())
