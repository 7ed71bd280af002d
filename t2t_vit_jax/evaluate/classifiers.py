"""Classifiers of features: nearest neighbours, and linear ones of all or of a few images. The model stays as it is.

A model tells the images that it was trained on apart better than new ones. So what is fitted to their features may fit
the test images less well than the features would allow.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.utils.extmath import weighted_mode

from t2t_vit_jax.data.class_names import comparable
from t2t_vit_jax.data.sources import Source
from t2t_vit_jax.errors import UserError, choose, plural, printable
from t2t_vit_jax.evaluate.features import Callback, Features

FIELDS = {'cls': 'class token', 'mean': 'mean of tokens'}  # of `Features`, by their names in a table
METHODS = ('knn', 'linear', 'few_shot')
NEIGHBOURS = (10, 20)
TEMPERATURE = 0.07  # of the neighbours' votes
# scikit-learn's C, the inverse of the penalty: a larger one fits the training images more closely.
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
DEFAULT_STRENGTH = 1.0  # where no image can be held out to choose one
FEW_SHOT_STRENGTH = 10.0
MAX_ITERATIONS = 1000
TOLERANCE = 1e-6  # of gradients; scikit-learn's 1e-4 is met early with many classes, whose gradients are small


class Row(NamedTuple):
  """Result of a method, for a table or JSON."""

  method: str  # such as '10-NN', 'linear' or '5-shot'
  features: str  # one of the names in `FIELDS`
  accuracy: float  # top-1, 0 to 1
  spread: float | None = None  # standard deviation over several draws of the training images
  note: str = ''


def check_same_classes(train: Source, test: Source) -> None:
  """Raises UserError unless both splits have the same classes in the same order, so that labels mean the same."""
  ours, theirs = comparable(train.class_names), comparable(test.class_names)
  if ours == theirs:
    return
  both = f'{train.description} and {test.description}'
  if different := sorted(set(ours) ^ set(theirs)):
    shown = ', '.join(map(printable, different[:3]))
    raise UserError(f'{both} do not have the same classes, such as {shown}: give two splits of one dataset')
  raise UserError(f'{both} have the same classes in another order: give two splits of one dataset')


def knn(train: Features, test: Features, field: str, neighbours: Sequence[int] = NEIGHBOURS) -> list[Row]:
  """Accuracy of votes among the training images that are most alike, for each number of neighbours.

  A neighbour's vote weighs exp(similarity / `TEMPERATURE`), where similarity is the cosine of the two features (Wu et
  al., CVPR 2018, arXiv 1805.01978; Caron et al., ICCV 2021, arXiv 2104.14294).

  Args:
    train: the images that vote.
    test: the images that are classified.
    field: which features, one of `FIELDS`.
    neighbours: numbers of voters; all training images vote if there are fewer.
  """
  to_unit_length, available = Normalizer().transform, len(train.label)
  # Of unit vectors the distance d tells the cosine: d**2 = 2 - 2 * cosine. The search holds a part of the distances.
  search = NearestNeighbors(n_neighbors=min(max(neighbours), available), algorithm='brute')
  search.fit(to_unit_length(getattr(train, field)))
  distances, nearest = search.kneighbors(to_unit_length(getattr(test, field)))
  votes, weights = train.label[nearest], np.exp((1 - distances**2 / 2) / TEMPERATURE)  # (N, neighbours), nearest first
  rows = []
  for k in neighbours:
    guesses, _ = weighted_mode(votes[:, :k], weights[:, :k], axis=1)
    few = f'there are only {available} training images: all vote' if available < k else ''
    rows.append(Row(f'{k}-NN', FIELDS[field], float(np.mean(guesses[:, 0] == test.label)), note=few))
  return rows


def linear_probe(train: Features, test: Features, field: str, seed: int = 0) -> Row:
  """Accuracy of a multinomial logistic regression on standardised features.

  One of `STRENGTHS` is chosen by the cross entropy on a fifth of each class's training images, which are held out;
  their accuracy would often be the same for several. Then all training images are fitted.

  Args:
    train: the images that are fitted.
    test: the images that are classified.
    field: which features, one of `FIELDS`.
    seed: decides which images are held out.
  """
  x, held_out, problems = getattr(train, field), hold_out(train.label, seed), set()
  strength, how = DEFAULT_STRENGTH, 'no class has five images, of which one could be held out to choose it'
  if held_out.any():
    losses = []
    for candidate in STRENGTHS:
      classifier, problem = _fit(StandardScaler(), x[~held_out], train.label[~held_out], candidate)
      guesses = classifier.predict_proba(x[held_out])
      losses.append(log_loss(train.label[held_out], guesses, labels=classifier.classes_))
      problems.add(problem)
    strength, how = STRENGTHS[int(np.argmin(losses))], 'chosen on a held-out fifth of the training images'
  classifier, problem = _fit(StandardScaler(), x, train.label, strength)
  problems.add(problem)
  note = '; '.join(filter(None, [f'C = {strength:g}, {how}', *sorted(problems)]))
  return Row('linear', FIELDS[field], float(classifier.score(getattr(test, field), test.label)), note=note)


def hold_out(labels: np.ndarray, seed: int) -> np.ndarray:
  """Mask (N,) of a random fifth of each class's images, rounded down."""
  return _random_rank(labels, seed) < np.bincount(labels)[labels] // 5


def few_shot(
  train: Features, test: Features, field: str, shots: Sequence[int] = (1, 5, 10), seeds: int = 5
) -> list[Row]:
  """Accuracy of a logistic regression on a few images of each class: mean and standard deviation over several draws.

  Features are scaled to length 1, as by Tian et al. (ECCV 2020, arXiv 2003.11539), since a few images say little about
  mean and variance. Measured with the mean of the tokens of a model of digits, 20 draws: fitted to one image each of 3
  and 8, features of length 1 gave an accuracy of 0.95, and features that these two had standardised 0.66. C = 10 gave
  0.916, 0.962 and 0.968 with 1, 5 and 10 images of each digit; C = 1, as Tian et al. have it, 0.904, 0.955 and 0.963.

  Args:
    train: the images that are drawn from.
    test: the images that are classified.
    field: which features, one of `FIELDS`.
    shots: numbers of images a class; a class that has fewer gives all of its images.
    seeds: number of draws, from seed 0 on.
  """
  rows, sizes = [], np.unique(train.label, return_counts=True)[1]
  for count in shots:
    accuracies, problems = [], set()
    for seed in range(seeds):
      drawn = draw(train.label, count, seed)
      classifier, problem = _fit(Normalizer(), getattr(train, field)[drawn], train.label[drawn], FEW_SHOT_STRENGTH)
      accuracies.append(classifier.score(getattr(test, field), test.label))
      problems.add(problem)
    if few := int((sizes < count).sum()):
      problems.add(f'{few} of {len(sizes)} classes have fewer images: all of theirs are used')
    spread = float(np.std(accuracies, ddof=1)) if seeds > 1 else None
    note = '; '.join(filter(None, sorted(problems)))
    rows.append(Row(f'{count}-shot', FIELDS[field], float(np.mean(accuracies)), spread, note))
  return rows


def draw(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Indices of `count` random images of each class, or of all that it has; a larger `count` adds to a smaller one's."""
  return np.flatnonzero(_random_rank(labels, seed) < count)


def _random_rank(labels: np.ndarray, seed: int) -> np.ndarray:
  """Position (N,) of each image in a random order of its class, from 0 on."""
  rng, rank = np.random.default_rng(seed), np.empty(len(labels), int)
  for label in np.unique(labels):
    members = labels == label
    rank[members] = rng.permutation(np.count_nonzero(members))
  return rank


def _fit(scaler: Any, x: np.ndarray, labels: np.ndarray, strength: float) -> tuple[Pipeline, str]:
  """Fits a scaler and a logistic regression (L-BFGS); returns both, and a note if the iterations did not converge."""
  classifier = make_pipeline(scaler, LogisticRegression(C=strength, tol=TOLERANCE, max_iter=MAX_ITERATIONS))
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always', ConvergenceWarning)
    classifier.fit(x, labels)
  if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
    return classifier, 'a fit did not converge'
  return classifier, ''


def _check_none_missing(
  one: str, ours: np.ndarray, other: str, theirs: np.ndarray, class_names: Sequence[str], advice: str = ''
) -> None:
  """Raises UserError unless the labels of one split, as it is called, include those of the other."""
  if len(missing := np.setdiff1d(theirs, ours)):
    names = ', '.join(printable(class_names[label]) for label in missing[:3])
    classes = plural(len(missing), 'class')
    raise UserError(f'of {classes} of the {other} images, no {one} image can be read: {names}{advice}')


def probe(
  train: Features,
  test: Features,
  class_names: Sequence[str],
  *,
  methods: Sequence[str] = METHODS,
  seed: int = 0,
  shots: Sequence[int] = (1, 5, 10),
  seeds: int = 5,
  allow_missing_classes: bool = False,
  note: Callback = lambda line: None,
) -> list[Row]:
  """Results of all methods on the class token, then on the mean of the other tokens.

  Args:
    train: features of the training split.
    test: features of the split that is classified, with the same classes; see `check_same_classes`.
    class_names: of both.
    methods: which of `METHODS`.
    seed: of the images that the linear probe holds out.
    shots: numbers of images a class.
    seeds: number of draws of those.
    allow_missing_classes: takes test images that lack some of the classes.
    note: gets a line before each method, since a large dataset takes long.

  Raises:
    UserError: the training split has fewer than two classes, or one split has no image of a class of the other.
  """
  known = np.unique(train.label)
  if len(known) < 2:
    raise UserError(f'the training images are of {len(known)} class, but to tell classes apart takes at least two')
  present = np.unique(test.label)
  _check_none_missing('training', known, 'test', present, class_names)
  if not allow_missing_classes:
    advice = '; --allow_missing_classes takes the others'
    _check_none_missing('test', present, 'training', known, class_names, advice)
  compute: dict[str, Callable[[str], list[Row]]] = {
    'knn': lambda field: knn(train, test, field),
    'linear': lambda field: [linear_probe(train, test, field, seed)],
    'few_shot': lambda field: few_shot(train, test, field, shots, seeds),
  }
  rows: list[Row] = []
  for field, name in FIELDS.items():
    for method in methods:
      note(f'{method} on the {name}')
      rows += choose(compute, 'method', method)(field)
  return rows
