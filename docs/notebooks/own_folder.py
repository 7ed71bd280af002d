# %% [markdown]
# # Train on a folder of your own
#
# A folder with a subfolder of pictures for each class is all that a run needs. This notebook writes such a folder from
# real pictures, fine-tunes a small model on it, predicts, and looks at what is confused. It runs in a checkout, with
# the extras `plots` and `probe`.
#
# No network is needed: the pictures are handwritten digits that come with scikit-learn, and the weights to start from
# are made here. They are of a model that has learned the digits 0 to 4. It is then fine-tuned on a few pictures of 5 to
# 9, which it never saw. With a network, and photographs in your folder, start from published weights instead:
# `--config.init_from=t2t_vit_14`.

# %%
# %cd -q ../..

# %%
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

# So that commands find the Python of this notebook.
os.environ['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])

# %% [markdown]
# ## The folder
#
# `FOLDER/train/CLASS/IMAGE` and `FOLDER/val/CLASS/IMAGE`; the names of the folders are those of the classes. Here
# `before` has as many pictures of 0 to 4 as there are, and `mine` has 40 training pictures of each of 5 to 9.

# %% tags=["exact"]
RUNS = Path('runs/own_folder')
NAMES = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
NUM_TEST = 30  # of each class
shutil.rmtree(RUNS, ignore_errors=True)  # what an earlier start of this notebook left

digits = load_digits()
for label, name in enumerate(NAMES):
  folder, number = ('before', None) if label < 5 else ('mine', 40)
  pictures = digits.images[digits.target == label]
  for split, part in {'val': pictures[:NUM_TEST], 'train': pictures[NUM_TEST:][:number]}.items():
    (RUNS / folder / split / name).mkdir(parents=True)
    for i, picture in enumerate(part):
      image = Image.fromarray(np.uint8(picture * (255 / 16)))
      image.save(RUNS / folder / split / name / f'{i:03}.png')
for split in sorted(RUNS.glob('*/*')):
  print(split, {path.name: len(list(path.iterdir())) for path in sorted(split.iterdir())})

figure, axes = plt.subplots(1, 10, figsize=(10, 1.4))
for axis, path in zip(axes, sorted(RUNS.glob('mine/train/*/00[01].png'))):
  axis.imshow(Image.open(path), cmap='gray')
  axis.set_title(path.parent.name, size=9)
  axis.axis('off')
plt.show()

# %% [markdown]
# ## Weights to start from
#
# These take the place of published ones. The run's last line is its accuracy.

# %% language="bash"
# set -o pipefail
# python train.py --workdir=runs/own_folder/start --config.data.source=folder \
#   --config.data.path=runs/own_folder/before --config.data.eval_split=val --config.schedule.epochs=20 \
#   --config.schedule.warmup_epochs=1 --config.checkpoint.every_epochs=20 2>&1 | tail -n 1

# %% [markdown]
# ## Fine-tune
#
# The weights decide the model and how images are prepared, the folder decides the classes, and the head is made anew. A
# few fields are set for these pictures. The defaults suit photographs and weights of ImageNet; these digits are small,
# and 5 to 9 look unlike 0 to 4:
#
# - `backbone_factor`: the layers below the head learn at the rate of the head, not at a hundredth of it;
# - `adamw` and its rate, as in the run of the digits;
# - `crop` shifts a picture by up to 2 px, and nothing is flipped: a part of a digit, or a mirrored one, may be another
#   sign.

# %% language="bash"
# set -o pipefail
# python train.py --config=configs/finetune.py --config.init_from=runs/own_folder/start --workdir=runs/own_folder/fine \
#   --config.data.source=folder --config.data.path=runs/own_folder/mine --config.schedule.epochs=12 \
#   --config.schedule.backbone_factor=1.0 --config.optimizer.name=adamw --config.schedule.base_learning_rate=2e-3 \
#   --config.augment.crop=padded --config.augment.crop_padding=2 --config.augment.horizontal_flip_probability=0.0 \
#   --config.checkpoint.every_epochs=12 2>&1 | tail -n 9

# %% [markdown]
# `runs/own_folder/fine` now holds the curves (`report.png`), the accuracy of each class (`per_class.csv`), and
# `weights/model.safetensors` with a model card.

# %% tags=["exact"]
print(*sorted(path.name for path in (RUNS / 'fine' / 'weights').iterdir()), sep='\n')

# %% [markdown]
# ## Predict
#
# The command takes pictures and folders. As text, for one picture of each class:

# %% language="bash"
# t2t-vit predict runs/own_folder/fine runs/own_folder/mine/val/*/000.png --top 2

# %% [markdown]
# As JSON it is easy to go on with. Here are all test pictures, and those that were taken for something else:

# %%
command = 't2t-vit predict runs/own_folder/fine runs/own_folder/mine/val --json'
results = json.loads(subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout)
truths = [Path(result['image']).parent.name for result in results]
guesses = [result['predictions'][0]['name'] for result in results]
right = sum(truth == guess for truth, guess in zip(truths, guesses))
print(f'test top-1 {100 * right / len(truths):.1f} % ({right}/{len(truths)})')

wrong = [i for i in range(len(truths)) if truths[i] != guesses[i]][:10]
figure, axes = plt.subplots(1, 10, figsize=(10, 1.6))
for axis in axes:
  axis.axis('off')
for axis, i in zip(axes, wrong):
  axis.imshow(Image.open(results[i]['image']), cmap='gray')
  axis.set_title(f'{truths[i]}:\n{guesses[i]}?', size=9)
plt.show()

# %% [markdown]
# ## What is confused with what
#
# A row is a true class, a column a guess.

# %%
matrix = confusion_matrix(truths, guesses, labels=NAMES[5:])
figure, axis = plt.subplots(figsize=(4.5, 4))
ConfusionMatrixDisplay(matrix, display_labels=NAMES[5:]).plot(ax=axis, cmap='Blues', colorbar=False)
plt.show()

# %% [markdown]
# ## From here
#
# - What the fields do, and how rates were chosen: [fine-tuning](../recipes.md#fine-tuning-on-a-folder-of-your-own).
# - Which pictures count, unreadable ones, orientation: [image folders](../data.md#image-folders).
# - Calibration, confusion and probes of any weights: [evaluation](../evaluate.md).
# - What the model looks at: [the other notebook](look_inside.ipynb).
