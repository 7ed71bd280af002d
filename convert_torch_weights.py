"""Converts PyTorch weights, as `python -m t2t_vit_jax.conversion` does, from a checkout that is not installed too."""

from absl import app

from t2t_vit_jax.conversion.__main__ import main, parse_flags

if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
