"""Writes the generated part of docs/plan.md: `python -m docs.plan_table FOLDER`.

The plans are kept in FOLDER as JSON, and only those that it lacks are made: minutes of compiling each.
"""

import json
from pathlib import Path
import subprocess
import sys

from t2t_vit_jax.planning import report

PAGE = Path(__file__).parent / 'plan.md'
START, END = '<!-- written by docs/plan_table.py -->\n', '<!-- end of the written part -->\n'
PLANS = {
  't2t_vit_14': ('v5e:2x2', 'v5e:16x16'),
  't2t_vit_14_384': ('v4:4x4x4', 'v5e:16x16'),
  't2t_vit_24': ('v4:4x4x4', 'v6e:16x16'),
  't2t_vit_t_14': ('v5e:2x2', 'v6e:16x16'),
}


def make_plans(folder: Path) -> list[dict]:
  """The plans of the table, from the tool where `folder` lacks them."""
  plans = []
  for config, slices in PLANS.items():
    for where in slices:
      file = folder / f'{config}_{where.replace(":", "_")}.json'
      if not file.exists():
        arguments = [f'--config=configs/{config}.py', f'--topology={where}', f'--output={file}']
        subprocess.run([sys.executable, '-m', 't2t_vit_jax.plan', *arguments], check=True)
      plans.append(json.loads(file.read_text()))
  return plans


def render(page: str, plans: list[dict]) -> str:
  """Returns the page with its generated part replaced.

  Raises:
    ValueError: the page lacks one of the two marks.
  """
  before, rest = page.split(START)
  _, after = rest.split(END)
  commands = [
    f'python -m t2t_vit_jax.plan --config=configs/{config}.py --compare={",".join(slices)}'
    for config, slices in PLANS.items()
  ]
  table = '\n'.join(report.table(plans, markdown=True))
  return f'{before}{START}\n```bash\n{chr(10).join(commands)}\n```\n\n{table}\n\n{END}{after}'


if __name__ == '__main__':
  PAGE.write_text(render(PAGE.read_text(), make_plans(Path(sys.argv[1]))))
