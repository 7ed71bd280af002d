"""Trains a T2T-ViT: python train.py --config=configs/t2t_vit_14.py --workdir=runs/t2t_vit_14.

The same as `t2t-vit train`, also from a checkout that is not installed.
"""

import sys

from t2t_vit_jax.train import main

if __name__ == '__main__':
  sys.exit(main())
