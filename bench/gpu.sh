#!/usr/bin/env bash
# Everything that a machine with an NVIDIA GPU can say about this tree, in one call of 9 minutes.
#
#     bench/gpu.sh [OUT]        OUT: where results go; without it bench/results/GPU, as by
#                             `mokd-fast bench` (bench/results/h200)
#
# A copy of the tree is built for this GPU alone and put to the test; nothing is installed and no
# package index is asked. Every part has a time limit, and one that fails or is stopped does not
# stop the next. OUT gets log.txt, summary.json and a .json for each part that makes figures; the
# exit status is 0 when every part passed. Environment:
#     PYTHON   an interpreter that has torch (python3)
#     PARTS    names of parts, to run these alone
#     TOTAL    seconds for all parts (530)
#     COMMIT   of the tree, where it is no git checkout
# Without a GPU: the build, and what the CPU can check of the scripts; then it fails and says so.
# shellcheck disable=SC2329  # the parts are called by name
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
total=${TOTAL:-530}

# part=limit in seconds, in order. What a part does is the function of its name below. Nothing is
# timed in those of TOGETHER, which run side by side: they wait for compilers most of the time.
LIMITS=(machine=30 build=110 check=180 tests=180 memcheck=180 racecheck=180 initcheck=180
    compiled=180 caches=180 distill=90 step=170 norms=30 linear=45 search=60 augment=20 data=60
    sweep=60)
TOGETHER=" check tests memcheck racecheck initcheck compiled caches "
NEED_NO_GPU=" machine build check "

# -- the parts, run in the copy of the tree, each by a call of this script of its own

has_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }

machine() {
    "$python" - "$OUT/machine.json" <<'PYTHON'
import json, os, shutil, subprocess, sys
sys.path.insert(0, os.getcwd())
import torch
from bench.timing import machine

def said(*command):
    path = shutil.which(command[0])
    done = path and subprocess.run([path, *command[1:]], capture_output=True, text=True)
    return done.stdout.strip() if done else None

asked = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
facts = machine() | {
    "commit": os.environ["COMMIT"],
    "nvidia_smi": said("nvidia-smi", f"--query-gpu={asked}", "--format=csv"),
    "nvcc": (said("nvcc", "--version") or "").split("\n")[-1] or None,
    "torch_cuda": torch.version.cuda,
    "cores_usable": len(os.sched_getaffinity(0)),
}
for name in ("triton", "numpy", "timm", "torchvision", "pydantic", "pytest", "pybind11", "setuptools"):
    try:
        from importlib.metadata import version
        facts[name] = version(name)
    except Exception:
        facts[name] = None
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    facts |= {"capability": [p.major, p.minor], "multiprocessors": p.multi_processor_count,
              "L2_bytes": p.L2_cache_size, "memory_bytes": p.total_memory}
with open(sys.argv[1], "w") as file:
    json.dump(facts, file, indent=1)
print(json.dumps(facts, indent=1))
if not torch.cuda.is_available():
    sys.exit("no CUDA device: torch.cuda.is_available() is False here")
PYTHON
}

arch() { # of this GPU as nvcc calls it; Hopper's where there is none
    "$python" -c 'import torch
major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
print(f"{major}{minor}" + "a" * ((major, minor) == (9, 0)))'
}

build() {
    local arch
    arch=$(arch) || return
    if ! MOKD_FAST_BUILD=cuda MOKD_FAST_CUDA_ARCHS=$arch "$python" setup.py build_ext --inplace; then
        echo "setup.py failed; by nvcc alone, CPU kernels of the baseline level only:"
        build_by_nvcc "$arch" || return
    fi
    "$python" -c 'import torch; from mokd_fast import _C; print(_C.build_info(), _C.cuda_versions())'
}

build_by_nvcc() { # needs no cmake, ninja or setuptools; torch has pybind11's headers
    local nvcc=${CUDACXX:-nvcc} headers torch suffix
    command -v "$nvcc" >/dev/null || nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))') || return
    torch=$("$python" -c 'import torch; print(torch.__path__[0])') || return
    suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))') || return
    "$nvcc" -O3 -std=c++17 -shared -cudart static "-gencode=arch=compute_$1,code=sm_$1" \
        -Xcompiler=-fPIC,-fvisibility=hidden,-fopenmp,-fno-math-errno,-fno-trapping-math -Xlinker -lgomp \
        "-DMOKD_CUDA=\"sm_$1\"" -DMOKD_LEVEL=baseline '-DMOKD_FAST_BUILD_TYPE="Release"' \
        -I "$headers" -I "$torch/include" -o "mokd_fast/_C$suffix" \
        csrc/bindings.cpp csrc/cpu/*.cpp csrc/cuda/*.cu
}

check() {
    if has_gpu; then
        "$python" bench/gpu_check.py --jobs 8 --json "$OUT/check.json"
    else
        "$python" bench/gpu_check.py --device cpu --backends cpu --small || return
        TRITON_INTERPRET=1 "$python" bench/gpu_check.py --device cpu --backends triton --small
    fi
}

pytests() { # processes, marks, files
    local count=$1 marks=$2 workers=()
    shift 2
    "$python" -c 'import xdist' 2>/dev/null && workers=(-n "$count")
    "$python" -m pytest -q -p no:cacheprovider -p tests.at_once --tb=short --durations=8 \
        -m "$marks" "${workers[@]}" "$@"
}
tests() { pytests 8 "gpu and not slow" tests/ops tests/kernels tests/train/test_{skipped,graph,adapters}.py; }
compiled() { pytests 3 "gpu and slow" tests/train/test_graph.py; } # by Inductor, for minutes

sanitize() { # tool backends checks [options of the sanitizer]
    local tool=$1 backends=$2 checks=$3 found=compute-sanitizer
    shift 3
    command -v "$found" >/dev/null || found=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
    # Without the caching allocator every tensor is an allocation of its own, with its own bounds.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$found" --tool "$tool" --error-exitcode 9 --launch-timeout 60 \
        --report-api-errors no --print-limit 20 "$@" \
        "$python" bench/gpu_check.py --small --backends "$backends" --only "$checks"
}
memcheck() {
    local checks=values,targets,strides,extremes,linear,search,weight_norm,normalised
    sanitize memcheck cuda,triton "$checks" --padding 64
}
# Not linear: this tool breaks off in cuBLAS's kernels for an H200, which memcheck finds clean.
racecheck() { sanitize racecheck cuda values,targets,search --kernel-name kns=mokd; }
initcheck() { sanitize initcheck cuda values,targets,search; }

distill() { "$python" bench/distill_gpu.py --json "$OUT/distill.json"; }
linear() { "$python" bench/linear_distill_gpu.py --json "$OUT/linear_distill.json"; }
search() { "$python" bench/search_gpu.py --json "$OUT/search.json"; }
norms() { "$python" bench/batch_norm_gpu.py --json "$OUT/batch_norm.json"; }
augment() { "$python" bench/augment_gpu.py --json "$OUT/augment.json"; }
sweep() { "$python" bench/distill_sweep.py --seconds 45 --json "$OUT/sweep.json"; }
step() { "$python" bench/step_gpu.py --seconds 110 --json "$OUT/step.json"; }
caches() { "$python" bench/step_gpu.py --quick --precisions fp16; } # what `step` would compile
data() { "$python" bench/data.py --quick --json "$OUT/data.json"; } # the host's part of the machine

if [[ ${1-} == --part ]]; then
    "$2"
    exit
fi

# -- the whole

"$python" -c 'import torch' || { echo "gpu.sh: $python has no torch; set PYTHON" >&2; exit 2; }
has_gpu && gpu=true || gpu=false
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT

# As installed: the kernels inside the package, the module built in place.
(cd "$root" && cp -r bench csrc kernels mokd_fast tests ./*.py ./*.toml ./*.txt ./*.md LICENSE "$work") || exit 2
rm -f "$work"/mokd_fast/_C*.so
# A built module comes before this file; without one, that of another tree must not be found.
echo 'raise ImportError("the build failed")' >"$work/mokd_fast/_C.py"
cp -r "$work/kernels" "$work/mokd_fast/kernels"

machine_name() {
    (cd "$work" && "$python" -c 'from mokd_fast.benchmarks import machine_name as n; print(n())')
}

if [[ -z ${1:-${OUT:-}} ]]; then
    OUT=$work/out # no figures to keep
    $gpu && { name=$(machine_name) && OUT=$root/bench/results/$name || exit 2; }
fi
OUT=${1:-$OUT}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
: "${COMMIT:=$(git -C "$root" describe --always --dirty 2>/dev/null || echo unknown)}"
export OUT COMMIT PYTHON=$python PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
: "${TORCHINDUCTOR_CACHE_DIR:=$work/inductor}" # one for all parts, and a new one
export TORCHINDUCTOR_CACHE_DIR
cd "$work" || exit 2

rows="" failed=()

record() { # name status seconds
    rows+="${rows:+,}"$'\n'" {\"part\": \"$1\", \"status\": \"$2\", \"seconds\": $3}"
    [[ $2 == passed ]] || failed+=("$1")
    echo "== $1: $2 after $3 s"
    printf '{"commit": "%s", "gpu": %s, "seconds": %d, "passed": %s, "parts": [%s\n]}\n' \
        "$COMMIT" "$gpu" "$SECONDS" "$( ((${#failed[@]})) && echo false || echo true)" "$rows" \
        >"$OUT/summary.json"
}

run() { # name limit
    local limit=$2 left=$((total - SECONDS)) begin=$SECONDS code
    if ! $gpu && [[ $NEED_NO_GPU != *" $1 "* ]]; then
        echo "not run: no CUDA device" >"$work/$1.status"
        return
    fi
    if ((left < 5)); then
        echo "not run: no time left" >"$work/$1.status"
        return
    fi
    ((limit > left)) && limit=$left
    echo "== $1, at most $limit s"
    timeout -k 5 "$limit" bash "$root/bench/gpu.sh" --part "$1" 2>&1
    code=$?
    case $code in
        0) echo passed ;;
        124 | 137) echo "stopped at $limit s" ;;
        *) echo "failed with exit status $code" ;;
    esac >"$work/$1.status"
    echo $((SECONDS - begin)) >"$work/$1.seconds"
}

ended() { # name
    record "$1" "$(<"$work/$1.status")" "$(cat "$work/$1.seconds" 2>/dev/null || echo 0)"
}

together() { # name=limit ...
    local part started=()
    for part in "$@"; do
        run "${part%%=*}" "${part##*=}" >"$work/${part%%=*}.log" &
        started+=($!)
    done
    wait "${started[@]}" # a plain `wait` waits for the log's `tee` as well, which waits for this
    for part in "${@%%=*}"; do
        cat "$work/$part.log"
        ended "$part"
    done
}

main() {
    local part now=() wanted=" ${PARTS:-${LIMITS[*]%%=*}} "
    for part in "${LIMITS[@]}"; do
        [[ $wanted == *" ${part%%=*} "* ]] || continue
        if [[ $TOGETHER == *" ${part%%=*} "* ]]; then
            now+=("$part")
            continue
        fi
        ((${#now[@]})) && together "${now[@]}" && now=()
        run "${part%%=*}" "${part##*=}"
        ended "${part%%=*}"
    done
    ((${#now[@]})) && together "${now[@]}"
    $gpu || echo "no CUDA device: only what needs none was run"
    if ((${#failed[@]})); then
        echo "FAILED after $SECONDS s: ${failed[*]}"
        return 1
    fi
    echo "all passed after $SECONDS s"
}

main > >(tee "$OUT/log.txt")
code=$?
wait $!
exit "$code"
