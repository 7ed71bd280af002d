"""T2T-ViT_t-14, softmax attention in the tokens-to-token module, on ImageNet-1k, from scratch.

python train.py --config=configs/t2t_vit_t_14.py --config.data.data_dir=DATA

Hardware: 8 devices with 64 images each, as published; on one add --config.optimizer.accumulate_steps=8.
Published top-1: 81.7 % (reference, EMA weights; 81.83 mmpretrain). Measured here: nothing.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.model.name = 't2t_vit_t_14'
  return config
