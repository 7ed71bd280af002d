"""Fine-tuning of any weights on any dataset: an image folder, or a tfds name.

python train.py --config=configs/finetune.py --config.init_from=t2t_vit_14 \
  --config.data.source=folder --config.data.path=DIR

DIR has train/CLASS/IMAGE and val/CLASS/IMAGE, or just CLASS/IMAGE: a fifth of each class is then held out. For tfds:
--config.data.name=NAME --config.data.eval_split=SPLIT in place of the last two flags. The weights decide about
model and preparation of images, the data about classes. To train the head alone (a linear probe):
--config.schedule.backbone_factor=0.

Rates and optimizer come from the published transfer to CIFAR; the rest is a choice for small data, tuned on nothing.

Hardware: any number of devices that divides 64.
Published top-1: none. Measured here: nothing.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config()
  config.init_from = 't2t_vit_14'
  with config.unlocked():  # None: as the weights have it
    config.model.name = placeholder(str)
    config.data.image_size = placeholder(int)
    config.data.crop_fraction = placeholder(float)
    config.data.interpolation = placeholder(str)
    config.data.mean = placeholder(tuple)
    config.data.std = placeholder(tuple)
    config.data.orientation = placeholder(str)
  config.data.eval_fraction = 0.2  # where the folder has no part for evaluation
  config.data.batch_size = 64
  config.data.min_steps_per_epoch = 8
  config.data.eval_batch_size = 64
  config.data.num_workers = 0  # threads: processes take seconds to start, anew for each evaluation
  config.data.num_threads = 4
  config.augment.crop_scale = (0.25, 1.0)
  config.augment.randaugment_operations = 0
  config.augment.mixup_alpha = 0.0
  config.augment.cutmix_alpha = 0.0
  config.augment.random_erasing_probability = 0.0
  config.optimizer.name = 'sgd'
  config.optimizer.weight_decay = 5e-4
  config.optimizer.gradient_clip_norm = 1.0  # a fresh head's first gradients are large
  config.schedule.base_learning_rate = 0.05  # for a batch of base_batch_size, linear in data.batch_size
  config.schedule.base_batch_size = 64
  config.schedule.backbone_factor = 0.01
  config.schedule.epochs = 30
  config.schedule.warmup_epochs = 1
  config.schedule.cooldown_epochs = 0
  config.schedule.final_learning_rate = 0.0
  config.schedule.granularity = 'step'
  config.ema.decay = 0.0  # a short run is over before a slow average has moved
  config.checkpoint.every_epochs = 3
  config.logging.every_steps = 10
  return config
