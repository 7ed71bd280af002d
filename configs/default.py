"""Every field of a run: the published ImageNet recipe for t2t_vit_14. Other configs are differences from this file."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
  """Returns the default config; a placeholder (None) stands for "as the named model has it"."""
  config = ConfigDict()
  config.seed = 0  # of parameters, order of the data, augmentation and dropout
  config.log_images = False  # write a picture of augmented images before the first step
  # Where compiled programs are kept for the next start. '': in the cache folder, on a CPU nowhere; 'none': nowhere.
  config.compilation_cache_dir = ''
  config.init_from = placeholder(str)  # weights to start from: a file, a run's folder or a name; None: random

  config.model = ConfigDict()
  config.model.name = 't2t_vit_14'
  config.model.dtype = 'bfloat16'  # of computation: 'float32', 'bfloat16' or 'float16'; parameters are float32
  config.model.num_classes = placeholder(int)  # None: as many as the data has
  config.model.tokens_type = placeholder(str)  # 'performer', 'transformer' or 'convolution'
  config.model.embed_dim = placeholder(int)
  config.model.depth = placeholder(int)
  config.model.num_heads = placeholder(int)
  config.model.mlp_ratio = placeholder(float)
  config.model.qkv_bias = placeholder(bool)
  config.model.qk_scale = placeholder(float)
  config.model.token_dim = placeholder(int)
  config.model.dropout_rate = 0.0
  config.model.attention_dropout_rate = 0.0
  config.model.stochastic_depth_rate = 0.1  # of the last block, rising linearly from 0
  config.model.performer_dropout_rate = 0.1  # inside the token performer
  config.model.soft_split_form = placeholder(str)  # 'conv' (the fast one) or 'patches'; changes no result
  config.model.token_attention_form = placeholder(str)  # 'auto', 'full' or 'chunked' (less memory); changes no result
  config.model.scan_blocks = placeholder(bool)  # True: blocks as a loop: compiles faster, other random draws
  config.model.attention_form = placeholder(str)  # None: 'auto'; 'cudnn' on GPUs in half precision, untried: see docs
  config.model.residual_dtype = placeholder(str)  # None: 'float32'; 'bfloat16' is faster in training and less exact
  config.model.remat = placeholder(str)  # what blocks keep for gradients; 'nothing_saveable': the least; see `T2TViT`

  config.data = ConfigDict()
  # 'tfds': prepared as array_record; 'folder': <path>/<split>/<class>/<image>; 'digits': those of the package
  config.data.source = 'tfds'
  config.data.name = 'imagenet2012'  # tfds name
  config.data.data_dir = placeholder(str)  # of tfds; None: TFDS_DATA_DIR or ~/tensorflow_datasets
  config.data.path = placeholder(str)  # of a folder source
  config.data.train_split = 'train'
  config.data.eval_split = 'validation'
  config.data.allow_missing_classes = False  # --evaluate: on data that has only some of the weights' classes
  config.data.eval_fraction = 0.0  # of a folder without <eval_split>: share of each class that is held out; 0: none
  config.data.image_size = 224  # px, height and width
  config.data.batch_size = 512  # images an optimizer step, of all devices
  config.data.min_steps_per_epoch = 0  # for small data: batch_size is halved until an epoch has this many; 0: never
  config.data.eval_batch_size = 512  # any number: padding is masked out
  config.data.crop_fraction = 0.9  # evaluation: share of the resized short side kept by the centre crop
  config.data.interpolation = 'bicubic'  # evaluation, and training with padded crops
  config.data.channels = placeholder(int)  # 3: RGB; 1: grey. None: as the weight file has it, else 3
  config.data.mean = (0.485, 0.456, 0.406)  # of RGB in [0, 1]; grey images get the average, of `std` too
  config.data.std = (0.229, 0.224, 0.225)
  # EXIF orientation: 'upright' turns images, 'ignored' does not, as published. None: as the weight file has it, else
  # 'upright' for folders, else 'ignored'.
  config.data.orientation = 'ignored'
  # Processes that decode and augment, for each process of the run; 0: threads. None: by processors and memory.
  config.data.num_workers = placeholder(int)
  config.data.num_threads = 1  # in each process
  config.data.fast_decode = False  # training: faster decoding and resizing, which round differently; see docs/data.md
  config.data.max_bad_fraction = (
    0.001  # of training images that may be unreadable before the run stops; unless 0, one may be
  )

  config.augment = ConfigDict()
  config.augment.crop = 'resized'  # 'resized': random area and aspect ratio; 'padded': random shift
  config.augment.crop_scale = (0.08, 1.0)  # share of the image's area
  config.augment.crop_ratio = (3 / 4, 4 / 3)  # width / height
  config.augment.crop_padding = 4  # px on each side, for padded crops
  config.augment.horizontal_flip_probability = 0.5
  config.augment.randaugment_operations = 2  # drawn for each image; 0: none
  config.augment.randaugment_magnitude = 9.0  # of 10
  config.augment.randaugment_magnitude_std = 0.5
  config.augment.randaugment_probability = 0.5  # of applying a drawn operation
  config.augment.mixup_alpha = 0.8  # 0: no mixup
  config.augment.cutmix_alpha = 1.0  # 0: no cutmix
  config.augment.cutmix_probability = 0.5  # the rest is mixup
  config.augment.mixing_group_size = 64  # images that share a draw (the reference's batch of a GPU); divides the batch
  config.augment.random_erasing_probability = 0.25
  config.augment.random_erasing_area = (0.02, 1 / 3)  # share of the image
  config.augment.random_erasing_aspect_ratio = (0.3, 1 / 0.3)
  config.augment.label_smoothing = 0.1

  config.optimizer = ConfigDict()
  config.optimizer.name = 'adamw'  # or 'sgd'
  config.optimizer.beta1 = 0.9  # of adamw
  config.optimizer.beta2 = 0.999  # of adamw
  config.optimizer.epsilon = 1e-8  # of adamw
  config.optimizer.momentum = 0.9  # of sgd
  config.optimizer.weight_decay = 0.05  # times the learning rate; adamw spares biases, LayerNorm and cls token
  config.optimizer.gradient_clip_norm = 0.0  # largest norm of a step's gradient, over all parameters; 0: no limit
  config.optimizer.nan_tolerance = 20  # steps in a row with a loss or gradient that is not finite, before the run stops
  config.optimizer.accumulate_steps = 1  # parts of a batch that go through the model one by one, to save memory

  config.schedule = ConfigDict()
  config.schedule.base_learning_rate = 5e-4  # peak for a batch of base_batch_size, linear in data.batch_size
  config.schedule.base_batch_size = 512
  config.schedule.backbone_factor = 1.0  # of the peak, for all parameters but the head's; 0: the head alone is trained
  config.schedule.epochs = 300  # of the cosine, warmup included; cooldown_epochs come after them
  config.schedule.cooldown_epochs = 10  # at the final learning rate
  config.schedule.warmup_epochs = 10
  config.schedule.warmup_learning_rate = 1e-6  # at the start of the warmup
  config.schedule.final_learning_rate = 1e-5
  config.schedule.granularity = 'epoch'  # the learning rate changes per 'epoch', as published, or per 'step'
  config.schedule.max_steps = 0  # the run ends here at the latest; 0: no limit

  config.ema = ConfigDict()
  config.ema.decay = 0.99996  # per step, of the weights' moving average, which is what the paper evaluates; 0: none

  config.checkpoint = ConfigDict()
  config.checkpoint.every_epochs = 1  # evaluate and save
  config.checkpoint.every_steps = 1000  # save in between too; 0: never
  config.checkpoint.keep_latest = 2  # beside the one with the best top-1
  config.checkpoint.allow_changes = False  # continue a run although its model or the order of its data has changed

  config.mesh = ConfigDict()
  config.mesh.data = -1  # data x fsdp devices share a batch; -1: the rest of the devices
  config.mesh.fsdp = 1  # neighbouring devices that divide parameters, moving average and optimizer state

  config.distributed = ConfigDict()
  config.distributed.timeout_s = 300.0  # a process that waits longer for others, at the start or later, ends

  config.logging = ConfigDict()
  config.logging.every_steps = 50
  config.logging.profile_steps = ()  # the first and the last step of a trace for xprof, such as (10, 20); (): none
  config.logging.tracker = ''  # gets the metrics too: 'wandb', 'mlflow' or 'wandb,mlflow'; each is an extra

  return config
