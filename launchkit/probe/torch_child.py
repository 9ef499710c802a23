"""``python -m launchkit.probe.torch_child``: what the installed torch says of itself, as one line of JSON.

A process of its own, since importing torch takes seconds and a broken one can end the process.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import sys
from typing import Any

# The compiled module of each package, whose import fails where it was built for another torch.
EXTENSIONS = {
    "flash-attn": "flash_attn_2_cuda",
    "torchvision": "torchvision",
    "torchaudio": "torchaudio",
    "xformers": "xformers",
}
LONGEST_ERROR = 200


def main() -> int:
    """Prints the facts; what torch itself prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        facts = describe()
    print(json.dumps(facts))
    return 0


def describe() -> dict[str, Any]:
    """The fields of ``launchkit.checkup.facts.Torch``."""
    try:
        import torch  # what this process is for
    except Exception as error:  # whatever a broken installation raises
        return {"error": one_line(error)}
    is_available = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda or "",
        "hip": torch.version.hip or "",
        "architectures": torch.cuda.get_arch_list(),
        "num_devices": torch.cuda.device_count() if is_available else 0,
        "broken_extensions": dict(broken_extensions()),
    }


def broken_extensions() -> list[tuple[str, str]]:
    """Installed packages whose compiled part does not load, with the error."""
    found = []
    for package, module in EXTENSIONS.items():
        if importlib.util.find_spec(module) is None:
            continue
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                importlib.import_module(module)
        except Exception as error:  # ImportError mostly, RuntimeError for operators that torch does not have
            found.append((package, one_line(error)))
    return found


def one_line(error: BaseException) -> str:
    """An exception as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_ERROR]


if __name__ == "__main__":
    sys.exit(main())
