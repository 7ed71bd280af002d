"""T2T-ViT-14 on ImageNet-1k at 384 px, from scratch.

python train.py --config=configs/t2t_vit_14_384.py --config.data.data_dir=DATA

Hardware: 8 devices with 64 images each; on one add --config.optimizer.accumulate_steps=8.
Batch, learning rate and weight decay are not published: the values for 224 px are assumed.
Published top-1: 83.3 % (reference, EMA weights). Measured here: nothing.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.data.image_size = 384
  return config
