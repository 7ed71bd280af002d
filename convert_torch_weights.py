"""Converts PyTorch weights like `python -m t2t_vit_jax.conversion`, also from a checkout that is not installed."""

from absl import app

from t2t_vit_jax.conversion.__main__ import main, parse_flags

if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
