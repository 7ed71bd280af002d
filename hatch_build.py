"""Tells the package's page where its repository is, and keeps files that git does not track out of a release.

GitHub's workflows set GITHUB_REPOSITORY to OWNER/NAME. With it the metadata get URLs, and the README's links and images
below this folder become links to the tag of this version. Without it there are no URLs, and the README stays as it is.
"""

import os
from pathlib import Path
import re
import shutil
import subprocess
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

# Code, or what stands before a path: `[text](path)`, `![text](path)`, `<img src="path">`.
CODE_OR_LINK = re.compile(r'^```.*?^```|`[^`\n]*`|(\]\(|\b(?:src|srcset|href)=")(?!\w+:|#|/)(?=[^\s)"])', re.M | re.S)
IMAGE = re.compile(r'[^\s)"]+\.(?:gif|jpe?g|png|svg|webp)[\s)"]')


class Metadata(MetadataHookInterface):
  """Adds the README and the URLs."""

  def update(self, metadata: dict[str, Any]) -> None:
    readme, metadata['urls'] = Path(self.root, 'README.md').read_text('utf-8'), {}
    if repository := os.environ.get('GITHUB_REPOSITORY'):
      url, tag = f'https://github.com/{repository}', f'v{metadata["version"]}'

      def absolute(match: re.Match[str]) -> str:
        kind = 'raw' if IMAGE.match(match.string, match.end()) else 'blob'
        return f'{match[0]}{url}/{kind}/{tag}/' if match[1] else match[0]

      readme = CODE_OR_LINK.sub(absolute, readme)
      metadata['urls'] = {'Repository': url, 'Issues': f'{url}/issues'}
      metadata['urls'] |= {'Documentation': f'{url}/tree/{tag}/docs', 'Changelog': f'{url}/blob/{tag}/CHANGELOG.md'}
    metadata['readme'] = {'content-type': 'text/markdown', 'text': readme}


class OnlyTracked(BuildHookInterface):
  """Ends the build of an sdist that would hold a file which git does not track, such as a config of one's own."""

  def initialize(self, version: str, build_data: dict[str, Any]) -> None:
    options: Any = dict(cwd=self.root, capture_output=True, text=True)
    listed = subprocess.run(['git', 'ls-files', '-z'], **options).stdout if shutil.which('git') else ''
    tracked = set(listed.split('\0'))
    included = {file.relative_path for file in self.build_config.builder.recurse_included_files()}
    if 'pyproject.toml' in tracked and (unknown := sorted(included - tracked)):  # else this is no clone but an sdist
      self.app.abort(f'git does not track {", ".join(unknown)}: add it with git add, or move it out of this folder')
