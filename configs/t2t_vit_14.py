"""T2T-ViT-14 on ImageNet-1k, from scratch.

python train.py --config=configs/t2t_vit_14.py --config.data.data_dir=DATA

Hardware: 8 devices with 64 images each, as published; on one add --config.optimizer.accumulate_steps=8.
Also published for 4 devices with 128 images: --config.augment.mixing_group_size=128
--config.schedule.base_learning_rate=1e-3
Published top-1: 81.5 % (reference, EMA weights). Measured here: nothing.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  return default.get_config()
