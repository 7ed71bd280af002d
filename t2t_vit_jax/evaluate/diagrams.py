"""Diagrams of a summary of `reliability`, drawn into a figure of matplotlib, and such a figure as SVG for a page."""

from collections.abc import Callable, Sequence
import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import FigureBase

Summary = dict[str, Any]
ACCURACY, GAP, COUNT = '#4a87c0', '#e8833a', '#8a8f98'  # colours that show on white and on black
INK = '#010203'  # a colour that nothing else has; in an SVG it becomes the page's colour of text
SVG_STYLE: Any = {'svg.fonttype': 'none', 'font.size': 10} | dict.fromkeys(
  ('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color'), INK
)


def draw_reliability(figure: 'FigureBase', summary: Summary) -> None:
  """Draws accuracy by confidence with the gap between the two, and below it the share of the images in each bin."""
  from matplotlib import rcParams

  upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  bins = [row for row in summary['bins'] if row['count']]
  left = [row['lower'] for row in bins]
  width = [row['upper'] - row['lower'] for row in bins]
  accuracy = [row['accuracy'] for row in bins]
  gap = [row['confidence'] - row['accuracy'] for row in bins]
  total = sum(row['count'] for row in bins)
  upper.bar(left, accuracy, width, align='edge', color=ACCURACY, label='accuracy')
  upper.bar(
    left, gap, width, bottom=accuracy, align='edge', fill=False, hatch='////', edgecolor=GAP, label='gap to confidence'
  )
  upper.plot([0, 1], [0, 1], linestyle='--', linewidth=1, color=rcParams['text.color'])
  upper.set_ylabel('accuracy')
  upper.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2, fontsize='small', frameon=False, borderaxespad=0.2)
  lower.bar(left, [row['count'] / total for row in bins], width, align='edge', color=COUNT)
  lower.set_ylabel('images')
  lower.set_xlabel('confidence')
  _percent_axes(upper)
  _percent_axes(lower)
  upper.set(xlim=(0, 1), ylim=(0, 1))


def draw_coverage(figure: 'FigureBase', summary: Summary) -> None:
  """Draws the accuracy of the most confident guesses by the share of the images that they are."""
  axes = figure.subplots()
  accuracy = [row['accuracy'] for row in summary['coverage']]
  axes.plot([row['share'] for row in summary['coverage']], accuracy, color=ACCURACY, marker='.', clip_on=False)
  margin = max(0.1 * (max(accuracy) - min(accuracy)), 0.01)
  axes.set(xlim=(0, 1), ylim=(max(0, min(accuracy) - margin), min(1, max(accuracy) + margin)))
  axes.set_xlabel('share of the images that are kept')
  axes.set_ylabel('accuracy')
  _percent_axes(axes)


def draw_pairs(figure: 'FigureBase', names: Sequence[str], counts: Sequence[int]) -> None:
  """Draws a bar for each pair of confused classes, the first at the top."""
  axes = figure.subplots()
  axes.barh(range(len(names)), counts, color=GAP)
  axes.set_yticks(range(len(names)), names, fontsize='small', parse_math=False)  # $ in a name starts no formula
  axes.invert_yaxis()
  axes.locator_params('x', integer=True)
  axes.set_xlabel('images')


def _percent_axes(axes: 'Axes') -> None:
  from matplotlib.ticker import PercentFormatter

  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter(PercentFormatter(1))
  axes.grid(alpha=0.3, linewidth=0.6)
  axes.set_axisbelow(True)


def as_svg(draw: Callable[['FigureBase', Summary], None], summary: Summary, name: str) -> str:
  """An SVG element whose lines and text have the page's colour of text.

  Args:
    draw: draws the summary.
    summary: of `reliability.summary`.
    name: another one for each diagram of a page, since the parts of an SVG refer to each other by derived names.
  """
  from matplotlib import rc_context
  from matplotlib.figure import Figure

  file, style = io.StringIO(), SVG_STYLE | {'svg.hashsalt': name}
  with rc_context(style):
    figure = Figure(figsize=(4.8, 3.8))
    figure.subplots_adjust(left=0.2, right=0.95, top=0.93, bottom=0.13, hspace=0.1)
    draw(figure, summary)
    figure.savefig(file, format='svg', transparent=True)
  svg = file.getvalue()
  svg = re.sub(r'<metadata>.*?</metadata>| id="[\w.]+_\d+"', '', svg[svg.index('<svg') :], flags=re.DOTALL)
  return svg.replace('<svg ', f'<svg role="img" aria-label="{name}" ', 1).replace(INK, 'currentColor')
