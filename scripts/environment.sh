# Sourced by scripts/demo and scripts/check: a virtual environment in .venv, made once and reused.
# PYTHON chooses the interpreter, LAUNCHKIT_VENV another place for the environment.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${LAUNCHKIT_VENV:-$root/.venv}
torch_version=2.13.0
deepspeed_version=0.19.8
cd "$root"

make_venv() {
    [ -x "$venv/bin/python" ] && return
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "$python is older than Python 3.11; run PYTHON=python3.11 $0" >&2
        exit 1
    }
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -q --upgrade pip
}

has() { # has PACKAGE[==VERSION]: installed already, whatever the local part of its version (2.13.0+cpu)
    "$venv/bin/python" - "$1" <<'END'
import sys
from importlib import metadata

name, _, wanted = sys.argv[1].partition("==")
try:
    found = metadata.version(name)
except metadata.PackageNotFoundError:
    sys.exit(1)
sys.exit(0 if wanted in ("", found, found.split("+")[0]) else 1)
END
}

install() { "$venv/bin/python" -m pip install -q "$@"; }

# torch goes first: whatever depends on it would otherwise choose a build, with CUDA libraries of several GB.
install_torch() {
    has "torch==$torch_version" && return
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then
        echo "no NVIDIA GPU found: installing the CPU build of torch $torch_version"
        install "torch==$torch_version+cpu" 2>/dev/null && return
        install --retries 1 --index-url https://download.pytorch.org/whl/cpu "torch==$torch_version" 2>/dev/null && return
        echo "the index of CPU builds cannot be reached: taking the default build"
    fi
    install "torch==$torch_version"
}

# once NAME COMMAND...: runs the command unless it has succeeded since pyproject.toml and these scripts last changed.
once() {
    local stamp="$venv/.launchkit-$1"
    local state
    state=$(cat pyproject.toml scripts/environment.sh "$0" | cksum)
    shift
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && return
    "$@"
    echo "$state" >"$stamp"
}
