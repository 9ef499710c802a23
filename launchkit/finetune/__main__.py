"""``python -m launchkit.finetune JOB.json``: one rank of the built-in fine-tune."""

from __future__ import annotations

import sys
from pathlib import Path

from launchkit.launch.job import FineTuneJob
from launchkit.process.worker import run_worker


def main() -> None:
    from launchkit.finetune.train import train  # torch: not before the log is in place

    path = Path(sys.argv[1])
    train(FineTuneJob.from_text(path.read_text(encoding="utf-8"), name=str(path)))


if __name__ == "__main__":
    sys.exit(run_worker(main))
