#!/usr/bin/env bash
# The published table on Qwen2.5, by the command that also makes the demo model's: where each method starts at 2, 3 and
# 4 bits, rank 16, and where the same fine-tuning on WikiText-2 ends, on WikiText-2 and C4, with three seeds.
#
#   benchmarks/qwen.sh 0.5B             one GPU with 24 GB
#   benchmarks/qwen.sh 3B               one GPU with 80 GB
#   benchmarks/qwen.sh 7B               one GPU with 80 GB
#   benchmarks/qwen.sh 3B --dry-run     the cells, which of them are done, and the hours by one step measured there
#
# What stands after the size goes to `qinit compare`. Stopped at any time, the same command goes on: every finished cell
# is kept in model_zoo/compare/Qwen2.5-SIZE. Needs the Hub: the models, Salesforce/wikitext and allenai/c4.
# It has not been run on a GPU by this project; the code is that of `make compare`, which runs on two CPU cores.
#
# Expected hours, printed first, are floating-point operations over an assumed speed:
#   A row is fine-tuned five times (three learning rates with the first seed, two more seeds), each time on
#   STEPS x BATCH x LENGTH tokens. With N parameters a token costs 2 N forward, 2 N back to the adapters (the frozen
#   weights have no gradient) and 2 N to compute activations again: 6 N; full fine-tuning 8 N.
#   It is measured six times on some 0.8M tokens, 2 N each: WikiText-2's test split (0.3M) and 256 windows of C4 (0.5M).
#   Speed: 40 TFLOP/s on a 24 GB card, 140 on an 80 GB one: a third to a half of what their bfloat16 products reach
#   (125 for an A10, 312 for an A100); on an H100 the hours are less than half. TFLOPS=... puts another one in.
#   Starts: LoftQ's five rounds of full SVDs dominate. Per width and layer of 7B about 10 s for each of the three large
#   matrices and 3 s for each of the four others, five times: 28 x 42 s x 5 = 1.6 h, and 0.3 h for QPiSSA's one round; the
#   cost of an SVD goes with the third power of the width. EQFT takes minutes. A guess, as it was never timed on a GPU.
set -euo pipefail

usage="usage: benchmarks/qwen.sh 0.5B|3B|7B [options of qinit compare]"
size=${1:?$usage}
shift
STEPS=${STEPS:-200} BATCH=16 LENGTH=1024

# parameters in billions, assumed TFLOP/s, hours of the starts, windows at once, ceilings, rows of the table
case $size in
  # Weights, gradients and Adam's moments in float32 take 16 bytes a parameter: 8 GB for 0.5B, 49 GB for 3B; the 122 GB of
  # 7B fit on no such card, so that its ceiling is 16-bit LoRA alone.
  0.5B) params=0.49 tflops=40 starts=0.2 micro=2 ceilings=lora,full rows=17 ;;
  3B) params=3.1 tflops=140 starts=1.5 micro=4 ceilings=lora,full rows=17 ;;
  7B) params=7.6 tflops=140 starts=6 micro=4 ceilings=lora rows=16 ;;
  *)
    echo "error: no size '$size'; $usage" >&2
    exit 2
    ;;
esac

awk -v n="$params" -v t="${TFLOPS:-$tflops}" -v s="$starts" -v r="$rows" -v w=$((STEPS * BATCH * LENGTH)) -v z="$size" \
  'BEGIN { f = r * n * 1e9 * (5 * 6 * w + 6 * 2 * 0.8e6)
           printf "Qwen2.5-%s: about %.0f hours at %g TFLOP/s, %.1f of them for the starts\n", z, f / t / 1e12 / 3600 + s, t, s }'

export TOKENIZERS_PARALLELISM=false
exec qinit compare "Qwen/Qwen2.5-$size" \
  --methods eqft,eqft:none,loftq,qpissa,qlora --bits 2,3,4 --rank 16 --calibration self \
  --text Salesforce/wikitext:wikitext-2-raw-v1@test --text allenai/c4:en@validation --length 2048 --windows 256 \
  --finetune "$STEPS" --train-text Salesforce/wikitext:wikitext-2-raw-v1@train \
  --train-length "$LENGTH" --batch "$BATCH" --micro-batch "$micro" --gradient-checkpointing \
  --learning-rates 1e-4,2e-4,4e-4 --full-learning-rates 1e-5,2e-5,4e-5 --seeds 0,1,2 --ceilings "$ceilings" \
  --device cuda --out "model_zoo/compare/Qwen2.5-$size" "$@"
