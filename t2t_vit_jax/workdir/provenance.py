"""The code, versions and devices that a result comes from."""

import functools
import importlib.metadata
from pathlib import Path
import platform
import subprocess
from typing import Any

import jax

from t2t_vit_jax.processes import PACKAGES, code_digest


@functools.cache
def provenance() -> dict[str, Any]:
  """Provenance of this process's results, as JSON.

  `commit` (None outside a git checkout), `code` (a digest), `versions` and `devices`.
  """
  kinds = sorted({device.device_kind for device in jax.devices()})
  return {
    'commit': _commit(),
    'code': code_digest(),
    'versions': {'python': platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES},
    'devices': f'{jax.device_count()} x {" and ".join(kinds)}',
  }


def _commit() -> str | None:
  root = Path(__file__).parents[2]
  if not (root / '.git').exists():  # an installed package may lie in a checkout of something else
    return None
  command = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None
