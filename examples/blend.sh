#!/usr/bin/env bash
# A small SambaY on a blend of datasets: how to weigh several, and how to give validation its own.
#
#     examples/blend.sh                              # three datasets, 1 in 100 documents for validation
#     SPLITS=given examples/blend.sh                 # datasets of their own for training and for validation
#     GPUS=1 examples/blend.sh --train-iters 1000
set -euo pipefail

CORPUS=${CORPUS:-data}                     # directory of what tools/preprocess_data.py wrote
TOKENIZER=${TOKENIZER:-data/tokenizer.model}
RUN=${RUN:-runs/blend}
GPUS=${GPUS:-8}

cd "$(dirname "$0")/.."

if [[ ${SPLITS:-by_ratio} == given ]]; then
    # Each split its own blend. Weights need not sum to 1; no weights at all means: all of every dataset, once.
    data=(
        --train-data-path 7 "$CORPUS/web_text_document" 3 "$CORPUS/code_text_document"
        --valid-data-path "$CORPUS/held_out_text_document"
        --test-data-path "$CORPUS/held_out_text_document"
    )
else
    # Of 10 training samples, 6 come from the web, 3 are code, 1 is a book, however large each dataset is: one that
    # runs out is repeated, reshuffled. --split cuts each dataset by documents, in order.
    data=(
        --data-path 6 "$CORPUS/web_text_document" 3 "$CORPUS/code_text_document" 1 "$CORPUS/books_text_document"
        --split 99,1,0
    )
fi

# The order of samples is computed once and kept here; a directory that all nodes see saves each its own work.
data+=(--data-cache-path "$RUN/index")

exec torchrun --standalone --nproc-per-node "$GPUS" pretrain_archscale.py \
    --train-model sambay --depth 8 --seq-length 4096 --micro-batch-size 4 --global-batch-size 512 --bf16 \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --train-iters 6041 --lr 4e-4 --min-lr 0 --lr-decay-style linear --lr-warmup-iters 477 \
    --adam-beta2 0.95 --weight-decay 0.1 --seed 3407 \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER" \
    --save "$RUN/checkpoints" --load "$RUN/checkpoints" --save-interval 500 --exit-signal-handler \
    --tensorboard-dir "$RUN/tensorboard" --log-interval 10 --log-throughput --eval-interval 500 --eval-iters 10 \
    "${data[@]}" "$@"
