"""The real lean_dojo, with the stand-in for Lean instead of a repository that it has traced."""

import os
from collections import namedtuple
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace

import lean_dojo
from lean_dojo import Theorem  # noqa: F401
from lean_stand_in import FOLDER

lean_dojo.interaction.dojo.get_traced_repo_path = lambda *_: Path(os.environ[FOLDER])


LeanGitRepo = namedtuple("LeanGitRepo", "url commit")


class Dojo(lean_dojo.Dojo):
    def _locate_traced_file(self, folder):
        return SimpleNamespace(has_prelude=False)

    def _modify_file(self, traced_file):
        folder = os.environ[FOLDER]
        self.modified_file = NamedTemporaryFile("w", suffix=".lean", dir=folder)  # noqa: SIM115
        self.modified_file.write(self.entry.full_name)
        self.modified_file.flush()
