"""Converts PyTorch weights like `t2t-vit convert`, also from a checkout that is not installed."""

import sys

from t2t_vit_jax.conversion.__main__ import main

if __name__ == '__main__':
  sys.exit(main())
