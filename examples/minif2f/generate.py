"""Write MiniF2F's theorems as prove.py reads them: test.json and valid.json beside this script.

    python examples/minif2f/generate.py
    python prove.py --theorems examples/minif2f/test.json --model ...

Their names come from the repository as LeanDojo has traced it, which takes some hours, once:

    python -c "from lean_dojo import *; trace(LeanGitRepo('URL', 'be17324...'))"

with URL as below and the commit for Lean 4.20.
"""

import json
import os
import re
from pathlib import Path

URL = "https://github.com/yangky11/miniF2F-lean4"
COMMIT = "be17324"  # its first digits
THEOREM = re.compile(r"^\s*theorem\s+([^\s:({\[]+)", re.MULTILINE)


def theorems(repository, commit, path):
    """Records in LeanDojo's format. unproved: what a proof must not cite, since the file proves its
    theorems by sorry."""
    names = THEOREM.findall((repository / path).read_text(encoding="utf-8"))
    place = {"url": URL, "commit": commit, "file_path": path, "unproved": names}
    return [place | {"full_name": name} for name in names]


def main(out=Path(__file__).parent):
    cache = Path(os.environ.get("CACHE_DIR", Path.home() / ".cache/lean_dojo"))
    found = sorted(cache.glob(f"*-miniF2F-lean4-{COMMIT}*/miniF2F-lean4"))
    if not found:
        raise SystemExit(f"error: {URL} at {COMMIT} is not in {cache}: trace it first")
    commit = found[0].parent.name.rpartition("-")[2]
    for split in ("test", "valid"):
        rows = theorems(found[0], commit, f"MiniF2F/{split.capitalize()}.lean")
        (out / f"{split}.json").write_text(json.dumps(rows, ensure_ascii=False))
        print(f"{out / split}.json: {len(rows)} theorems")


if __name__ == "__main__":
    main()
