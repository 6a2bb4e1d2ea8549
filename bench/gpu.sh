#!/usr/bin/env bash
# Everything that a machine with a GPU should do, unattended, in parts of under 9 minutes each, in this order. From a
# source tree, offline, with the packages that are there.
#
#   bash bench/gpu.sh right        environment, Triton's cache filled, tests
#   bash bench/gpu.sh fast         capture, and the number: a step of 5w5s by every way of convolving
#   bash bench/gpu.sh precisions   the same step in tf32 and bfloat16, with 16 tasks, and ResNet-12's
#   bash bench/gpu.sh kernels      five kernels' counters, launch settings of the heaviest shapes and what a step gains
#   bash bench/gpu.sh safe         sanitizers, and a training run against the CPU's losses
#   bash bench/gpu.sh table        operators, roofline, episodes per second, peers
#   bash bench/gpu.sh [PART...]    several of them; none is all
#
# Results, logs and one archive go to $OUT (default bench/results/gpu-<date>), after every stage.
#
# CXGRAD_GPU_SIZE   full (default with a GPU), small (default without: the same stages on the CPU), tiny (for tests)
# PYTHON            the interpreter (default python3)
# TRITON_CACHE_DIR  where compiled kernels stay, for the next part too (default: Triton's own, ~/.triton/cache)
#
# Every stage has its own time limit. One that fails is reported and the rest still runs; the exit code is then 1.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
ROOT=$PWD
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$ROOT/bench/results/gpu-$(date -u +%Y-%m-%dT%H%M%S)}
PARTS=(right fast precisions kernels safe table)
chosen=" ${*:-${PARTS[*]}} "
for part in $chosen; do
    case " ${PARTS[*]} " in *" $part "*) ;; *) echo "bench/gpu.sh takes some of ${PARTS[*]}, got '$part'" >&2 && exit 2 ;; esac
done

device=cpu
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && device=cuda
size=${CXGRAD_GPU_SIZE:-$([ "$device" = cuda ] && echo full || echo small)}
case $size in full | small | tiny) ;; *) echo "CXGRAD_GPU_SIZE takes full, small or tiny, got '$size'" >&2 && exit 2 ;; esac

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
RESULTS=$WORK/results
mkdir -p "$OUT" "$RESULTS"
export PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${HOME:-$WORK}/.triton/cache}

failed=()
# after every stage, so that a run that is cut off leaves what it has: few files, as some lenders bring back only a few
keep() {
    printf '%s\n' "device $device, size $size" "failed: ${failed[*]:-none}" >"$RESULTS/summary.txt"
    tar -czf "$OUT/gpu-results.tar.gz" -C "$RESULTS" .
    cp "$RESULTS/summary.txt" "$OUT/"
    find "$RESULTS" -maxdepth 1 -name '*.json' -exec cp {} "$OUT/" \;
}

# stage NAME SECONDS COMMAND...: its output on the screen and in NAME.log; a machine without a GPU has five times as long
stage() {
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    [ "$size" = full ] || limit=$((5 * limit))
    echo "== $name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$RESULTS/$name.log"
    local code=${PIPESTATUS[0]}
    if [ "$code" = 124 ] || [ "$code" = 137 ]; then echo "-- $name: over its limit of $limit s"; fi
    if [ "$code" != 0 ]; then
        failed+=("$name")
        echo "-- $name FAILED with code $code after $((SECONDS - begin)) s"
    else
        echo "-- $name: done in $((SECONDS - begin)) s"
    fi
    keep
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

# --- right ---

environment() {
    local tool
    nvidia-smi 2>/dev/null || echo "no nvidia-smi"
    for tool in gcc g++ nvcc ncu compute-sanitizer; do command -v "$tool" || echo "no $tool"; done
    "$PYTHON" -m pip --version
    "$PYTHON" -m cxgrad_fast.info
}

# precompile BACKBONE: all processors fill Triton's cache, which one process would do for minutes; once for these sources
precompile() {
    local workers=1 of=30 precisions=float32 each stamp
    case $size in
    full) workers=$(nproc) of=$workers precisions=float32,tf32,bfloat16 ;;
    small) of=10 ;; # a part: nothing here will launch them
    esac
    stamp=$TRITON_CACHE_DIR/precompiled-$1-$size-$(cat "$ROOT"/kernels/*.py "$ROOT"/kernels/*/*.py "$ROOT"/bench/gpu_table.py | sha256sum | cut -c1-16)
    if [ "$size" = full ] && [ -e "$stamp" ]; then echo "$1: in the cache" && return; fi
    local running=() code=0
    for ((each = 0; each < workers; each++)); do
        OMP_NUM_THREADS=1 "$PYTHON" bench/precompile.py "$each" "$of" "$precisions" "$1" --size "$size" &
        running+=($!)
    done
    for each in "${running[@]}"; do wait "$each" || code=1; done
    if [ "$code" = 0 ] && [ -d "$TRITON_CACHE_DIR" ]; then touch "$stamp"; fi
    return "$code"
}

checks() {
    "$PYTHON" -m pytest -p no:cacheprovider -W default "$@" # other versions warn of other things
}

# with a cache of their own (tests/conftest.py): what they measure, many at a time, is not kept
tests() {
    case $size in
    # a kernel is compiled for every case: that is the time, and the host has cores
    full) checks -n 12 tests -k "cuda or golden" -rs --durations=10 --maxfail=30 ;;
    small) checks tests/test_cases.py tests/test_meta_loss.py -k "golden or float64" ;;
    tiny) checks tests/test_meta_loss.py -k "golden and maml and exact" ;;
    esac
}

# --- fast ---

# one process on the device: eager and captured to the bit, what a failed capture leaves, an all-reduce in a graph
capture() {
    local files=(tests/test_captured.py tests/test_cuda_graphs.py)
    case $size in
    full)
        checks "${files[@]}" tests/test_ways.py -rs --maxfail=10 \
            -k "one_graph or captured_way or measuring_on_cuda or cuda_graphs and on_cuda"
        ;;
    small) checks "${files[@]}" ;;
    tiny) checks tests/test_cuda_graphs.py -k "garbage or share" ;;
    esac
}

# step NAME SECONDS OPTION...: the profile of a meta-step, into a folder of its name
step() {
    local name=$1 limit=$2
    shift 2
    echo "-- $name"
    timeout --kill-after=5 "$limit" "$PYTHON" bench/profile_step.py --out "$RESULTS/steps/$name" "$@"
}

number() {
    local way code=0 preset=(--preset released-mini-5w5s)
    case $size in
    full)
        for way in triton grouped tasks unfold ""; do
            CXGRAD_CONVOLUTION=$way step "${way:-measured}" 35 "${preset[@]}" --run.compile true --steps 20 || code=1
        done
        step uncompiled 30 "${preset[@]}" --steps 5 || code=1
        ;;
    small) step cpu 900 --steps 3 || code=1 ;;
    tiny) step cpu 900 --steps 1 --model.filters 4 --inner.steps 1 || code=1 ;;
    esac
    return "$code"
}

# --- precisions ---

precisions() {
    local precision code=0 preset=(--preset released-mini-5w5s --run.compile true --steps 20)
    [ "$size" = full ] || { echo "needs a GPU" && return; }
    for precision in tf32 bfloat16; do
        step "$precision" 35 "${preset[@]}" --run.precision "$precision" || code=1
    done
    step 16-tasks 40 "${preset[@]}" --outer.meta_batch 16 || code=1
    timeout 90 bash -c 'precompile resnet12' || code=1
    step resnet12 60 --preset released-mini-5w1s --model.backbone resnet12 --model.filters 64 --outer.meta_batch 2 \
        --run.compile true --steps 10 || code=1
    return "$code"
}

# --- kernels ---

# of two meta-steps that nothing else profiles
counters() {
    local kernel code=0 job='{"preset": "released-mini-5w5s", "overrides": {}, "steps": 1}'
    [ "$size" = full ] || { echo "needs a GPU" && return; }
    command -v ncu >/dev/null || { echo "no ncu" && return 1; }
    for kernel in _convolve _weight_gradient _activate _forward _second; do
        echo "-- $kernel"
        timeout --kill-after=5 30 ncu --clock-control none --set full -k "regex:^$kernel\$" -c 3 \
            "$PYTHON" bench/meta_step_worker.py "$job" </dev/null || code=1
    done
    return "$code"
}

# the table of this GPU: reviewed, and if the whole step gains more than 2 % by it, it goes to kernels/launch_tables/
launches() {
    local kernel code=0 table=$RESULTS/launch_table.json
    [ "$size" = full ] || { "$PYTHON" -m cxgrad_fast.kernels.tune --list && return; }
    for kernel in conv_block_convolve conv_block_weight_gradient; do # what is found by the limit stays
        timeout 70 "$PYTHON" -m cxgrad_fast.kernels.tune --kernel "$kernel" --out "$table" \
            --where outputs=48 --where inputs=48 --where size=42,21,10 --where tasks=2 --where images=25,75
        case $? in 0 | 124) ;; *) code=1 ;; esac
    done
    local found=(--preset released-mini-5w5s --run.compile true --steps 20)
    export CXGRAD_CONVOLUTION=triton
    step without-the-table 30 "${found[@]}" || code=1
    if [ -e "$table" ]; then CXGRAD_LAUNCH=$table step with-the-table 30 "${found[@]}" || code=1; fi
    return "$code"
}

# --- safe ---

# Cases of each kernel, those of production among them (float32 on tensor cores), by the tools that see what a test
# cannot. Torch's caching allocator would put small tensors side by side, where nobody sees one run into the next.
# racecheck does not follow asynchronous copies and Hopper's products: the last, and the least to be believed.
sanitizers() {
    local tool tests=(tests/test_conv_block_triton.py tests/test_first_layer_triton.py tests/test_weights_triton.py)
    [ "$size" = full ] || { echo "needs a GPU" && return; }
    command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer" && return 1; }
    local cases="float32_error_on_cuda and (48_channels or first_layer) or fast_products_on_cuda and tf32"
    cases+=" or float64_on_cuda and (plain or first_layer_grey) or test_on_cuda and two_layers"
    cases+=" or statistics_on_cuda and plain"
    for tool in memcheck initcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
            "$PYTHON" -m pytest -p no:cacheprovider -W default "${tests[@]}" -x -q -k "$cases" || return
    done
}

# the same seeds on the device, captured, and on the CPU: the first losses agree, then rounding parts them
training() {
    local at
    local rest=(--preset glyphs-5w1s --outer.iterations 60 --outer.validate_every 60 --evaluation.test_tasks 20)
    rest+=(--evaluation.validation_tasks 20)
    [ "$size" = full ] || { echo "needs a GPU" && return; }
    for at in cpu cuda; do # the first draws the letters
        timeout "$([ "$at" = cpu ] && echo 130 || echo 70)" "$PYTHON" -m cxgrad_fast.train "${rest[@]}" --compile \
            --run.device "$at" --out "$WORK/$at" || return
        cp "$WORK/$at/metrics.csv" "$RESULTS/training-$at.csv" || return
    done
    "$PYTHON" - "$WORK/cpu" "$WORK/cuda" <<'END'
import sys
from pathlib import Path
from cxgrad_fast.runs import read_metrics
cpu, cuda = (read_metrics(Path(run))["train"]["loss"] for run in sys.argv[1:])
for step in (0, 1, 2, 4, 9, 19, 39, 59):
    print(f"step {step + 1}: loss {cpu[step]:.6f} on the CPU, {cuda[step]:.6f} on the device")
sys.exit(abs(cpu[0] - cuda[0]) > 1e-4 * cpu[0])
END
}

# --- table ---

operators() {
    local which=(bench/test_operators.py "--benchmark-json=$RESULTS/operators.json")
    which+=(--benchmark-columns=median,iqr)
    case $size in
    full) checks "${which[@]}" -k "cuda and not conv4-64 and not query" ;;
    small) checks "${which[@]}" -k "cpu and quick" ;;
    tiny) checks "${which[@]}" -k "reference and cpu and layer4 and quick" ;;
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

has() { [[ $chosen == *" $1 "* ]]; }

export -f checks step environment precompile tests capture number precisions counters launches sanitizers training
export -f operators peers
export ROOT PYTHON WORK RESULTS size
echo "device $device, size $size, results in $OUT"
if ! install; then
    echo "the package can be neither installed nor linked" >&2
    exit 1
fi
# the C++ operators, where nobody has built them here yet
stage build 60 "$PYTHON" -c 'from cxgrad_fast.kernels import backends; print(backends.availability())'
if has right; then stage environment 30 bash -c environment; fi
stage precompile 90 bash -c 'precompile conv4'
if has right; then
    stage tests 280 bash -c tests
fi
if has fast; then
    stage capture 100 bash -c capture
    stage number 215 bash -c number
fi
if has precisions; then
    stage precisions 270 bash -c precisions
fi
if has kernels; then
    stage counters 160 bash -c counters
    stage launches 210 bash -c launches
fi
if has safe; then
    stage sanitizers 180 bash -c sanitizers
    stage training 205 bash -c training
fi
if has table; then
    stage operators 90 bash -c operators
    if [ "$size" != tiny ]; then stage roofline 25 "$PYTHON" bench/roofline.py; fi
    stage episodes 170 "$PYTHON" bench/gpu_table.py --size "$size" --out "$RESULTS" --seconds "$([ "$size" = tiny ] && echo 0.3 || echo 2)"
    if [ "$size" != tiny ]; then stage peers 100 bash -c peers; fi
fi

keep
echo "== ${#failed[@]} stages failed: ${failed[*]:-none}; $OUT/gpu-results.tar.gz"
[ ${#failed[@]} = 0 ]
