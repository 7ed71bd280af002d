"""T2T-ViT-14 on ImageNet-1k, from scratch.

python train.py --config=configs/t2t_vit_14.py --workdir=runs/t2t_vit_14

Published top-1: 81.5 % (reference, EMA weights). Measured here: nothing yet.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  """Returns the run's config: the default is this run."""
  return default.get_config()
