"""How far guesses can be trusted: calibration, accuracy of the most confident ones, and classes that are confused."""

from typing import Any

import numpy as np

from t2t_vit_jax.data.loader import UNREADABLE
from t2t_vit_jax.recipe.evaluation import Guesses

NUM_BINS = 15  # of confidence, as in Guo et al. 2017
COVERAGES = (1, 2, 5, *range(10, 101, 10))  # percent of the images
MAX_PAIRS = 20
MAX_EXAMPLES = 4  # images of a pair
ROUNDING = 1e-5  # that may bring a probability above 1


def summary(guesses: Guesses) -> dict[str, Any]:
  """Figures about the guesses that were right and wrong, for JSON; they do not depend on the order of the images.

  Images that could not be read are counted, and left out of all else. Figures of no image are None.

  Returns:
    images: number of images.
    unreadable: number of those that could not be read.
    accuracy: share of right guesses among the images that could be read.
    confidence: mean probability of the guesses.
    calibration_error: expected calibration error, the mean over the images of how far accuracy and confidence of their
      bins lie apart (Guo et al. 2017, arXiv 1706.04599, equation 3).
    bins: see `calibration_bins`.
    coverage: see `coverage_curve`.
    risk_coverage_area: mean share of wrong guesses among the k most confident ones, over all k (Geifman et al. 2019,
      arXiv 1805.08206); 0 if all are right.
    confused: see `confused_pairs`.

  Raises:
    ValueError: a confidence is no probability.
  """
  order = np.lexsort((guesses.index, -guesses.confidence))
  order = order[guesses.label[order] != UNREADABLE]
  right, confidence = guesses.right[order], guesses.confidence[order]
  if not ((confidence >= 0) & (confidence <= 1 + ROUNDING)).all():
    raise ValueError('a confidence is no number from 0 to 1')
  count = len(order)
  bins = calibration_bins(right, confidence)
  gaps = [row['count'] * abs(row['accuracy'] - row['confidence']) for row in bins if row['count']]
  num_right = right_of_most_confident(right, confidence)
  return {
    'images': len(guesses.index),
    'unreadable': len(guesses.index) - count,
    'accuracy': float(right.mean()) if count else None,
    'confidence': float(confidence.mean(dtype=np.float64)) if count else None,
    'calibration_error': sum(gaps) / count if count else None,
    'bins': bins,
    'coverage': coverage_curve(num_right, confidence),
    'risk_coverage_area': float(np.mean(1 - num_right[1:] / np.arange(1, count + 1))) if count else None,
    'confused': confused_pairs(guesses.index[order], guesses.label[order], guesses.guess[order], right),
  }


def calibration_bins(right: np.ndarray, confidence: np.ndarray) -> list[dict[str, Any]]:
  """Rows lower, upper, count, confidence, accuracy: the guesses by their confidence, in `NUM_BINS` equal intervals.

  An interval has its upper bound, and not its lower one. Confidence and accuracy are means, None without a guess.
  """
  bounds = np.arange(NUM_BINS + 1) / NUM_BINS
  # In float32, as the confidences: 0.2 is the bound 3/15 then, and not slightly above it.
  numbers = np.searchsorted(bounds[1:-1].astype(np.float32), confidence, side='left')
  counts, rights, sums = (np.bincount(numbers, x, NUM_BINS) for x in (None, right, confidence))
  return [
    {
      'lower': float(lower),
      'upper': float(upper),
      'count': int(count),
      'confidence': float(total / count) if count else None,
      'accuracy': float(num_right / count) if count else None,
    }
    for lower, upper, count, num_right, total in zip(bounds, bounds[1:], counts, rights, sums, strict=False)
  ]


def right_of_most_confident(right: np.ndarray, confidence: np.ndarray) -> np.ndarray:
  """Number of right guesses among the k most confident ones, for each k from 0 to N: (N + 1,) float64.

  If only some of the guesses with the same confidence are among them, it is the expectation when chance picks those.

  Args:
    right: (N,) bool, in descending order of confidence.
    confidence: (N,).
  """
  totals = np.concatenate([[0], np.cumsum(right)])
  ends = np.concatenate([[0], np.flatnonzero(np.diff(confidence)) + 1, [len(right)]])  # of guesses equally confident
  return np.interp(np.arange(len(totals)), ends, totals[ends])


def coverage_curve(num_right: np.ndarray, confidence: np.ndarray) -> list[dict[str, Any]]:
  """Rows share, kept, least_confidence, accuracy: what is right if the least confident guesses are refused.

  A share of the images, rounded up to whole ones, is kept. The least confidence is that of the last guess kept.

  Args:
    num_right: (N + 1,), see `right_of_most_confident`.
    confidence: (N,), in descending order.
  """
  count = len(confidence)
  kept = [-(-percent * count // 100) for percent in COVERAGES] if count else []
  return [
    {
      'share': percent / 100,
      'kept': k,
      'least_confidence': float(confidence[k - 1]),
      'accuracy': float(num_right[k] / k),
    }
    for percent, k in zip(COVERAGES, kept, strict=False)
  ]


def confused_pairs(index: np.ndarray, label: np.ndarray, guess: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
  """Rows label, guess, count, of, examples: the most frequent wrong guesses for the images of a class.

  At most `MAX_PAIRS`, sorted by count, then by label and guess. `of` is the number of images of the label, and examples
  are the numbers of up to `MAX_EXAMPLES` of the images, the most confident guesses first. Images with several labels
  are left out.

  Args: as in `Guesses`, each (N,), in descending order of confidence.
  """
  chosen = ~right & (label >= 0)
  pairs, numbers, counts = np.unique(
    np.stack([label[chosen], guess[chosen]], axis=1), axis=0, return_inverse=True, return_counts=True
  )
  return [
    {
      'label': int(pairs[i, 0]),
      'guess': int(pairs[i, 1]),
      'count': int(counts[i]),
      'of': int((label == pairs[i, 0]).sum()),
      'examples': index[chosen][numbers == i][:MAX_EXAMPLES].tolist(),
    }
    for i in np.argsort(-counts, kind='stable')[:MAX_PAIRS]
  ]
