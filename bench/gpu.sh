#!/usr/bin/env bash
# Everything that a machine with a GPU should do, unattended, in two parts of under 9 minutes each. From a source tree,
# offline, with the packages that are there.
#
#   bash bench/gpu.sh right      environment, tests, sanitizers
#   bash bench/gpu.sh fast       launch settings, operators, episodes, peers, profile
#   bash bench/gpu.sh            both
#
# Results, logs and one archive go to $OUT (default bench/results/gpu-<date>).
#
# CXGRAD_GPU_SIZE  full (default with a GPU), small (default without: the same stages on the CPU), tiny (for tests)
# PYTHON           the interpreter (default python3)
#
# Every stage has its own time limit. One that fails is reported and the rest still runs; the exit code is then 1.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
ROOT=$PWD
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$ROOT/bench/results/gpu-$(date -u +%Y-%m-%dT%H%M%S)}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
RESULTS=$WORK/results
mkdir -p "$OUT" "$RESULTS"
export PYTHONUNBUFFERED=1
part=${1:-all}
case $part in right | fast | all) ;; *) echo "bench/gpu.sh takes right, fast or nothing, got '$part'" >&2 && exit 2 ;; esac

device=cpu
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && device=cuda
size=${CXGRAD_GPU_SIZE:-$([ "$device" = cuda ] && echo full || echo small)}
case $size in full | small | tiny) ;; *) echo "CXGRAD_GPU_SIZE takes full, small or tiny, got '$size'" >&2 && exit 2 ;; esac

failed=()
# after every stage, so that a run that is cut off leaves what it has: few files, as some lenders bring back only a few
keep() {
    tar -czf "$OUT/gpu-results.tar.gz" -C "$RESULTS" .
    find "$RESULTS" -name '*.json' -exec cp {} "$OUT/" \;
}

# stage NAME SECONDS COMMAND...: its output on the screen and in NAME.log
stage() {
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    echo "== $name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$RESULTS/$name.log"
    local code=${PIPESTATUS[0]}
    keep
    if [ "$code" = 124 ] || [ "$code" = 137 ]; then echo "-- $name: over its limit of $limit s"; fi
    if [ "$code" != 0 ]; then
        failed+=("$name")
        echo "-- $name FAILED with code $code after $((SECONDS - begin)) s"
    else
        echo "-- $name: done in $((SECONDS - begin)) s"
    fi
    return "$code"
}

# is the package that python finds, from anywhere, the one of this tree?
importable() {
    (cd / && "$PYTHON" - "$ROOT" <<'END'
import sys
from pathlib import Path
import cxgrad_fast, cxgrad_fast.kernels as kernels
tree = Path(sys.argv[1])
files = [Path(module.__file__).resolve() for module in (cxgrad_fast, kernels)]
sys.exit(files != [tree / "cxgrad_fast/__init__.py", tree / "kernels/__init__.py"])
END
    ) 2>/dev/null
}

install() {
    importable && return
    "$PYTHON" -m pip install -q --no-deps --no-build-isolation -e . >"$RESULTS/install.log" 2>&1 && importable && return
    echo "pip cannot install here (install.log): a tree of links stands in for it"
    mkdir -p "$WORK/site"
    cp -rs "$ROOT/cxgrad_fast" "$WORK/site/" && cp -rs "$ROOT"/{kernels,csrc} "$WORK/site/cxgrad_fast/"
    # without the folder a command is started in, which would come before the links
    export PYTHONPATH=$WORK/site:$ROOT/bench PYTHONSAFEPATH=1
    importable
}

environment() {
    nvidia-smi 2>/dev/null || echo "no nvidia-smi"
    "$PYTHON" -m cxgrad_fast.info
}

tests() {
    local plain=(-p no:cacheprovider -W default) # other versions warn of other things
    case $size in
    # a kernel is compiled for every case: that is the time, and the host has cores
    full) "$PYTHON" -m pytest "${plain[@]}" -n 12 tests -k "cuda or golden" -rs --durations=10 ;;
    small) "$PYTHON" -m pytest "${plain[@]}" tests/test_cases.py tests/test_meta_loss.py -k "golden or float64" ;;
    tiny) "$PYTHON" -m pytest "${plain[@]}" tests/test_meta_loss.py -k "golden and maml and exact" ;;
    esac
}

# one case of each kernel, by the tools that see what a test cannot
sanitizers() {
    local tool tests=(tests/test_conv_block_triton.py tests/test_first_layer_triton.py tests/test_weights_triton.py)
    [ "$size" = full ] || { echo "needs a GPU" && return; }
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
            "$PYTHON" -m pytest -p no:cacheprovider -W default "${tests[@]}" -x -q \
            -k "float64_on_cuda and (plain or first_layer_grey) or test_on_cuda and two_layers or statistics_on_cuda and plain" ||
            return
    done
}

# the table of this GPU: reviewed, it goes to kernels/launch_tables/
launches() {
    case $size in
    full) # all kernels take an hour of compiling: the heaviest first, and what is found by the limit stays
        local kernel
        for kernel in conv_block_convolve first_layer_forward conv_block_weight_gradient; do
            timeout 28 "$PYTHON" -m cxgrad_fast.kernels.tune --kernel "$kernel" --out "$RESULTS/launch_table.json" ||
                [ $? = 124 ] || return 1
        done
        ;;
    *) "$PYTHON" -m cxgrad_fast.kernels.tune --list ;;
    esac
}

operators() {
    local which=(bench/test_operators.py -p no:cacheprovider -W default "--benchmark-json=$RESULTS/operators.json")
    which+=(--benchmark-columns=median,iqr)
    case $size in
    full) "$PYTHON" -m pytest "${which[@]}" -k "cuda and not conv4-64 and not query" ;;
    small) "$PYTHON" -m pytest "${which[@]}" -k "cpu and quick" ;;
    tiny) "$PYTHON" -m pytest "${which[@]}" -k "reference and cpu and layer4 and quick" ;;
    esac
}

# against the per-task loop and vmap, equal work checked
peers() {
    local options=(--out "$RESULTS" --limit 18 --rounds 5)
    case $size in
    full) options+=(--preset released-mini-5w1s,released-mini-5w5s --sides ours-reference,ours-triton,loop,func-vmap) ;;
    small) options+=(--preset glyphs-5w1s --sides ours-reference,loop) ;;
    esac
    "$PYTHON" bench/episodes.py "${options[@]}"
}

profile() {
    local options=(--out "$RESULTS" --steps 3)
    case $size in
    full)
        "$PYTHON" bench/profile_step.py "${options[@]}" --preset released-mini-5w1s &&
            "$PYTHON" bench/profile_step.py "${options[@]}" --preset released-mini-5w5s
        ;;
    small) "$PYTHON" bench/profile_step.py "${options[@]}" ;;
    tiny) "$PYTHON" bench/profile_step.py --out "$RESULTS" --steps 1 --model.filters 4 --inner.steps 1 ;;
    esac
}

export -f environment tests sanitizers launches operators peers profile
export ROOT PYTHON WORK RESULTS size
echo "device $device, size $size, results in $OUT"
if ! install; then
    echo "the package can be neither installed nor linked" >&2
    exit 1
fi
# the C++ operators, where nobody has built them here yet
stage build "$([ "$size" = full ] && echo 60 || echo 300)" "$PYTHON" -c 'from cxgrad_fast.kernels import backends; print(backends.availability())'
if [ "$part" != fast ]; then
    stage environment 30 bash -c environment
    stage tests 300 bash -c tests
    stage sanitizers 130 bash -c sanitizers
fi
if [ "$part" != right ]; then
    stage launches 95 bash -c launches
    stage operators 90 bash -c operators
    if [ "$size" != tiny ]; then stage roofline 25 "$PYTHON" bench/roofline.py; fi
    stage episodes 130 "$PYTHON" bench/gpu_table.py --size "$size" --out "$RESULTS" --seconds "$([ "$size" = tiny ] && echo 0.3 || echo 2)"
    if [ "$size" != tiny ]; then stage peers 75 bash -c peers; fi
    stage profile 40 bash -c profile
fi

printf '%s\n' "device $device, size $size" "failed: ${failed[*]:-none}" >"$RESULTS/summary.txt"
keep
echo "== ${#failed[@]} stages failed: ${failed[*]:-none}; $OUT/gpu-results.tar.gz"
[ ${#failed[@]} = 0 ]
