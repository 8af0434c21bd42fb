#!/bin/sh
# Speeds, times and memory on one GPU, unattended, in at most 25 minutes: sh benchmarks/gpu.sh OUT [PART...]
#
# Needs, and downloads nothing: a python (PYTHON names another) with a CUDA build of torch, lrcompress and its
# dependencies; torchao for int4; 30 GB of disk for WORK (default OUT/work). The parts, each with a time limit of its own:
#   ffn           an FFN of width 5120 at 32 % and 63 % of the parameters, bfloat16, forward and training step;
#                 and one of a 7B model for 1, 8 and 64 tokens
#   ffn_compiled  the same by torch.compile
#   model         two blocks of a 7B model: prefill, decode and training step, batch 1, 8, 64
#   graphs        decode of the same by CUDA graphs
#   block_8b      `factorize` of one block of an 8B model (4096 x 14336, gated) by auto
#   whole_1b      `factorize` of a whole 1.2B model by auto
#   int4          two blocks of a 7B model with int4 weights: bytes and decode
# A part that fails or takes too long is named, and the next one starts. OUT/gpu.json has the machine and all results,
# OUT/gpu.md the tables of them; a later call adds to both, so that parts may be split over several calls (graphs and
# int4 read the models that `model` left in WORK).
# Dry run without a GPU, with tiny shapes: TINY=1 sh benchmarks/gpu.sh OUT
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
if [ -n "${TINY:-}" ]; then
    device=cpu bits=int8 tokens=16 batches=1,2 sizes=tiny whole=tiny
    paper="--width 64 --ffn-width 256 --no-gated --tokens 16 --dtype bfloat16"
    small="--width 64 --ffn-width 192"
    lengths="--prompt-length 8 --new-tokens 2 --training-length 8 --repeats 3"
    shape=tiny samples=8 repeats=3 length=64
else
    device=cuda bits=int4 tokens=1,8,64 batches=1,8,64 sizes=8B whole=1.2B
    paper="--preset paper"
    small="--width 4096 --ffn-width 11008"
    lengths="--prompt-length 512 --new-tokens 16 --training-length 1024 --repeats 5"
    shape=7B samples=16 repeats=7 length=512
fi
bench="$python -m lrcompress bench"
scale="$python $here/scale.py"

run_part() {
    case $1 in
        ffn)
            $bench ffn $paper --keep-ratio 0.32,0.63 --device $device --backward --path plain,optimized \
                --repeats $repeats --out "$2/paper"
            $bench ffn $small --tokens $tokens --device $device --dtype bfloat16 \
                --repeats $repeats --out "$2/small" ;;
        ffn_compiled)
            $bench ffn $paper --keep-ratio 0.32,0.63 --device $device --form factored,pivoted --path compiled \
                --repeats $repeats --out "$2/paper" ;;
        model)
            $python "$here/gpu.py" model "$2/dense" --shape $shape
            for form in factored pivoted; do
                $python -m lrcompress factorize "$2/dense" --out "$2/$form" --device $device --dtype bfloat16 \
                    --method svd --form $form --keep-ratio 0.6 --rank-multiple 32
            done
            $python -m lrcompress factorize "$2/dense" --out "$2/narrowed" --device $device --dtype bfloat16 \
                --method ppm --keep-ratio 0.6 --rank-multiple 32 --calibration pydoc --num-samples 2 --seq-len $length
            for form in factored pivoted narrowed; do
                $bench model "$2/$form" --device $device --dtype bfloat16 --batch-size $batches $lengths \
                    --out "$2/bench-$form"
            done ;;
        graphs)
            $python "$here/gpu.py" graphs "$work/model" --device $device --batch-size $batches --repeats $repeats \
                --prompt-length $length --out "$2/graphs.json" ;;
        block_8b)
            $scale "$2" --sizes $sizes --blocks 1 --methods auto --ways memory --growth "" --device $device \
                --samples $samples --length $length ;;
        whole_1b)
            $scale "$2" --sizes $whole --methods auto --ways memory --growth "" --device $device \
                --samples $samples --length $length ;;
        int4)
            for form in dense pivoted; do
                $python -m lrcompress quantize "$work/model/$form" --weights $bits --device $device \
                    --dtype bfloat16 --out "$2/$form"
            done
            $bench model "$2/pivoted" --baseline "$2/dense" --device $device --batch-size $batches $lengths \
                --no-training --out "$2/bench" ;;
        *)
            echo "no part is called $1" >&2
            exit 2 ;;
    esac
}

limit_of() {
    case $1 in
        ffn) echo 200 ;; ffn_compiled) echo 200 ;; model) echo 250 ;; graphs) echo 120 ;;
        block_8b) echo 250 ;; whole_1b) echo 320 ;; *) echo 120 ;;
    esac
}

if [ "$1" = --part ]; then # one part, in a process group of its own that `timeout` can end
    work=$4
    run_part "$2" "$3"
    exit
fi

out=${1:?give a folder for the results}
shift
[ $# -gt 0 ] || set -- ffn ffn_compiled model graphs block_8b whole_1b int4
work=${WORK:-$out/work}
mkdir -p "$out" "$work"
$python "$here/gpu.py" start "$out" --device $device
for part; do
    [ -n "${TINY:-}" ] && limit=3600 || limit=$(limit_of "$part")
    begin=$(date +%s) status=0
    echo "$part: at most $limit s"
    rm -rf "${work:?}/$part"
    mkdir "$work/$part"
    timeout --kill-after=10 "$limit" sh "$0" --part "$part" "$work/$part" "$work" >"$work/$part.log" 2>&1 || status=$?
    $python "$here/gpu.py" record "$out" "$part" --folder "$work/$part" --log "$work/$part.log" \
        --status $status --seconds $(($(date +%s) - begin)) --limit "$limit"
done
$python "$here/gpu.py" table "$out/gpu.json" >"$out/gpu.md"
