"""`import dagjax` is light: what few need is loaded where it is needed."""

import json
import subprocess
import sys

HEAVY = ["networkx", "scipy.stats", "scipy.sparse", "matplotlib", "sklearn"]


def test_heavy_packages_are_not_imported():
    found = f"[m for m in {HEAVY!r} if m in sys.modules]"
    code = f"import dagjax, json, sys; print(json.dumps({found}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
