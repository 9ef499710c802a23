"""``python -m launchkit.finetune.run_script train.py args…``: one rank of a script of the user's own, unchanged.

The script sees the ``sys.argv``, ``sys.path`` and ``__name__`` that Python itself would give it. Around it the rank
writes its log and measures memory and steps; what makes accelerate shard on the CPU is put in place before.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from pathlib import Path

from launchkit.launch.environment import CPU_ENGINES_VARIABLE
from launchkit.process.worker import run_worker


def main() -> None:
    # torch: not before the log is in place
    from launchkit.finetune.devices import check_devices
    from launchkit.finetune.measure import StepMeter

    check_devices()
    # It warns of a kernel that only 4-bit models on the CPU would use, in every script that imports peft.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if os.environ.get(CPU_ENGINES_VARIABLE):
        from launchkit.finetune import cpu_fsdp

        cpu_fsdp.install()
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).parent)
    meter = StepMeter.from_environment(resets_peaks=False)
    meter.follow_optimizers()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        meter.finish()


if __name__ == "__main__":
    sys.exit(run_worker(main))
