#!/usr/bin/env bash
# Check adapterkit on a GPU, and measure it there: benchmarks/gpu_check.sh
#
# Runs the tests marked `gpu`, benchmarks/gpu.py and benchmarks/train.py, each under a time limit of its own, in less
# than 8 minutes on one H100. The results are files in $OUT, .cache/gpu-check by default: a log for each step, and
# summary.md. The exit status is 0 only if every step passed.
#
# Needs Python 3.11 or newer with torch (CUDA), transformers, peft, safetensors, numpy, hypothesis, pytest and click,
# with what these bring along, the wheel of google-re2, and below Python 3.14 that of backports.zstd. Nothing is
# installed or downloaded. Compares with bitsandbytes where it is installed; Textual is not needed.
#
# PYTHON=…    the Python to use (default: .venv/bin/python if there is one, else python3)
# DEVICE=cpu  try out the script itself, with a tiny model and without the tests
set -uo pipefail
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] && default=.venv/bin/python || default=python3
python=$(command -v "${PYTHON:-$default}") || { echo "gpu_check.sh: no ${PYTHON:-$default} here" >&2; exit 2; }
device=${DEVICE:-cuda}
out=${OUT:-.cache/gpu-check}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 ADAPTERKIT_CACHE=$PWD/.cache

"$python" - "$device" > "$out/machine.txt" <<'PYTHON' || { cat "$out/machine.txt" >&2; exit 2; }
import platform, sys
from importlib import import_module, metadata

needed = "torch transformers peft safetensors numpy hypothesis pytest click huggingface_hub rich yaml psutil re2".split()
missing = []
for module in needed + (["backports.zstd"] if sys.version_info < (3, 14) else []):
    try:
        import_module(module)
    except ImportError as error:
        missing.append(f"{module} ({error})")
if missing:
    sys.exit("gpu_check.sh: install the wheels (for re2, google-re2) of " + ", ".join(missing))
import torch

if sys.argv[1] != "cpu" and not torch.cuda.is_available():
    sys.exit(f"gpu_check.sh: torch {torch.__version__} finds no CUDA device here")
print(torch.cuda.get_device_name() if sys.argv[1] != "cpu" else "the CPU, to try out the script")
print(f"Python {platform.python_version()}, CUDA {torch.version.cuda}")
for package in ("torch", "triton", "transformers", "peft", "safetensors", "numpy", "bitsandbytes"):
    try:
        print(package, metadata.version(package))
    except metadata.PackageNotFoundError:
        print(package, "not installed")
PYTHON
cat "$out/machine.txt"
{ echo "# GPU check"; echo; sed 's/^/- /' "$out/machine.txt"; echo; echo "| step | result | seconds |"; echo "|---|---|--:|"; } \
    > "$out/summary.md"

failed=0
step() { # NAME LIMIT COMMAND…: run a command for at most LIMIT seconds, its output to $out/NAME.txt
    local name=$1 limit=$2 begin=$SECONDS result=passed
    shift 2
    echo "== $name: $*"
    timeout --kill-after=5 "$limit" "$@" > "$out/$name.txt" 2>&1
    case $? in
        0) ;;
        124 | 137) result="**stopped** after $limit s" failed=1 ;;
        *) result="**failed**" failed=1 ;;
    esac
    tail -n 60 "$out/$name.txt"
    echo "| $name | $result | $((SECONDS - begin)) |" | tee -a "$out/summary.md"
}

if [ "$device" = cpu ]; then
    step resident 120 "$python" -m benchmarks.gpu --device cpu --shape tiny --layers 2 --parts exactness resident four-bits
    step files 120 "$python" -m benchmarks.gpu --device cpu --shape tiny --layers 2 --rounds 1 --parts files
    step train 120 "$python" -m benchmarks.train --rounds 1 --steps 1 gpu --device cpu --shape tiny --layers 2 --batch 2 --length 64
else
    # Only the files with such tests: others import what need not be installed here.
    mapfile -t tests < <(grep -l 'pytest\.mark\.gpu' -r --include='test_*.py' tests)
    step tests 150 "$python" -m pytest -m gpu -p no:cacheprovider "${tests[@]}"
    step resident 90 "$python" -m benchmarks.gpu --parts exactness resident four-bits
    step files 150 "$python" -m benchmarks.gpu --shape 1b --layers 22 --rounds 2 --parts files
    step train 80 "$python" -m benchmarks.train --rounds 1 --steps 5 gpu
fi
exit $failed
