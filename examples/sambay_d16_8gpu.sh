#!/usr/bin/env bash
# SambaY at depth 16 (1 billion parameters without the embedding) on one node of 8 GPUs.
#
#     DATA=/data/slimpajama_text_document TOKENIZER=/data/llama2.model examples/sambay_d16_8gpu.sh
#
# Further options go at the end and win: examples/sambay_d16_8gpu.sh --micro-batch-size 4
set -euo pipefail

DATA=${DATA:-data/train_text_document}     # what tools/preprocess_data.py wrote, without .bin and .idx
TOKENIZER=${TOKENIZER:-data/tokenizer.model}
RUN=${RUN:-runs/sambay_d16}                # checkpoints and TensorBoard logs; an existing run is continued
TP=${TP:-1}                                # depth 16 has 4 key-value heads: 1, 2 or 4

cd "$(dirname "$0")/.."

# Tensor parallelism overlaps communication with computation only if kernels start in the order of the calls.
export CUDA_DEVICE_MAX_CONNECTIONS=1

model=(--train-model sambay --depth 16 --seq-length 4096)

# 512 sequences are 2^21 tokens. A model this small fits one GPU: all 8 are data parallel (TP=1), and the
# distributed optimizer gives each an eighth of the fp32 state.
layout=(
    --tensor-model-parallel-size "$TP"
    --micro-batch-size 2 --global-batch-size 512
    --bf16
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
if ((TP > 1)); then layout+=(--sequence-parallel); fi

# ArchScale's standard parametrization: 101.36 billion tokens in 48,334 steps, the first billion (477 steps)
# to warm up.
optimizer=(
    --train-iters 48334
    --lr 4e-4 --min-lr 0 --lr-decay-style linear --lr-warmup-iters 477
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --weight-decay 0.1 --clip-grad 1.0
    --seed 3407
)

data=(
    --data-path "$DATA" --split 99,1,0 --data-cache-path "$RUN/index"
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER" --num-workers 4
)

# SIGTERM saves and exits; starting again continues from the newest checkpoint.
run=(
    --save "$RUN/checkpoints" --load "$RUN/checkpoints" --save-interval 1000 --exit-signal-handler
    --tensorboard-dir "$RUN/tensorboard" --log-interval 10 --log-throughput
    --eval-interval 1000 --eval-iters 10
)

exec torchrun --standalone --nproc-per-node 8 pretrain_archscale.py \
    "${model[@]}" "${layout[@]}" "${optimizer[@]}" "${data[@]}" "${run[@]}" "$@"
