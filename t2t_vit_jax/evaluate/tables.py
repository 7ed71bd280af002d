"""Tables of figures as text, Markdown, JSON and CSV."""

from collections.abc import Sequence
import json
from typing import Any, NamedTuple

from t2t_vit_jax.errors import csv_line

FORMS = ('text', 'json', 'csv', 'markdown')
ENDINGS = {'.json': 'json', '.csv': 'csv', '.md': 'markdown'}  # of files, and the form that they mean


class Table(NamedTuple):
  """A table for people; its cells are printable."""

  heading: tuple[str, ...]
  cells: Sequence[tuple[str, ...]]
  numbers: tuple[str, ...]  # headings of the columns that are aligned on the right


def render(
  form: str, rows: Sequence[dict[str, Any]], tables: Sequence[Table], notes: Sequence[str], fields: Sequence[str]
) -> str:
  """The text of an output in one of `FORMS`.

  Args:
    form: text and Markdown have the tables and notes, JSON a list of the rows, CSV a line for each row.
    rows: with all fields.
    tables: for people.
    notes: lines below them.
    fields: columns of the CSV form.
  """
  if form == 'json':
    return json.dumps(list(rows), indent=1) + '\n'
  if form == 'csv':
    return ''.join([csv_line(*fields), *(csv_line(*(_cell(row.get(field)) for field in fields)) for row in rows)])
  lines: list[str] = []
  for table in tables:
    lines += [*(_text_lines(table) if form == 'text' else _markdown_lines(table)), '']
  below = notes if form == 'text' else [f'- {_escaped(note)}' for note in notes]
  return '\n'.join([*lines, *below, '']) if below else '\n'.join(lines)


def percent(share: float | None) -> str:
  """A share as a percentage with two decimals; empty for None."""
  return '' if share is None else f'{100 * share:.2f}'


def _text_lines(table: Table) -> list[str]:
  widths = [max(map(len, column)) for column in zip(table.heading, *table.cells, strict=True)]
  lines = []
  for cells in (table.heading, *table.cells):
    columns = zip(table.heading, cells, widths, strict=True)
    lines.append(
      '  '.join(f'{x:{">" if name in table.numbers else "<"}{width}}' for name, x, width in columns).rstrip()
    )
  return lines


def _markdown_lines(table: Table) -> list[str]:
  ruler = '|'.join('---:' if name in table.numbers else '---' for name in table.heading)
  heading, *lines = (f'| {" | ".join(map(_escaped, cells))} |' for cells in (table.heading, *table.cells))
  return [heading, f'|{ruler}|', *lines]


def _escaped(text: str) -> str:
  """Text in a cell of Markdown: nothing in it is taken for a format."""
  return ''.join(f'\\{letter}' if letter in '\\`*_{}[]<>|' else letter for letter in text)


def _cell(value: Any) -> Any:
  """A value as a cell of CSV: a size as HEIGHTxWIDTH, None as nothing."""
  if isinstance(value, list | tuple):
    return 'x'.join(map(str, value))
  return '' if value is None else value
