"""Torch-Pruning in another Python, asked in JSON lines; see torch_pruning_side.py."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

_SIDE = Path(__file__).with_name("torch_pruning_side.py")
HOW = "python -m venv VENV && VENV/bin/pip install torch==2.13.0 torch-pruning==1.6.1"


class TorchPruning:
    """A PyTorch process that waits for its turn.

    Args:
        python: A Python with torch and torch-pruning.
    """

    def __init__(self, python: str):
        pipe = subprocess.PIPE
        command = [python, str(_SIDE)]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.versions = self.ask(do="versions")

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"no answer; {HOW}"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self.ask(do="quit")
        self.process.wait()
