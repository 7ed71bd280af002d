"""T2T-ViT-7, one of the lite models, on ImageNet-1k, from scratch.

python train.py --config=configs/t2t_vit_7.py --config.data.data_dir=DATA

Hardware: 8 devices with 64 images each, as published; on one add --config.optimizer.accumulate_steps=8.
Published top-1: 71.7 % (reference, EMA weights). Measured here: nothing.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.model.name = 't2t_vit_7'
  config.schedule.base_learning_rate = 1e-3  # for a batch of 512, linear in data.batch_size
  config.optimizer.weight_decay = 0.03
  return config
