#!/bin/bash
# Fine-tune a language model on conversations with torchrun, on one machine or several, from any folder.
#
#   bash sft_rm.sh [KEY=VALUE ...]
#
# The launcher and the trainer are those of ../bradley_terry; sft.yaml in this folder has the recipe's values.
# Environment variables override the settings below; KEY=VALUE arguments override both. NNODES and NODE_RANK take
# precedence over WORLD_SIZE and RANK, which some schedulers set instead; with several nodes MASTER_ADDR is node 0.

TIMESTAMP=$(date "+%m%dT%H%M")
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export SCRIPT_NAME=sft_rm.sh CONFIG=${CONFIG:-$HERE/sft.yaml}

# Model and data
export SAVE_PATH=${SAVE_PATH:-./checkpoints/sft}
export MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-7B-Instruct}
export TRAIN_FILE=${TRAIN_FILE:-./data/train.parquet}
export VAL_FILE=${VAL_FILE-./data/test.parquet} # empty: no validation
export MAX_LENGTH=${MAX_LENGTH:-8192}
export TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-96}                      # conversations per step, over all GPUs
export MICRO_BATCH_SIZE_PER_GPU=${MICRO_BATCH_SIZE_PER_GPU:-12}      # conversations of maximum length at once

# Optimization
export LR=${LR:-2e-5}
export CLIP_GRAD=${CLIP_GRAD:-1}
export TOTAL_EPOCHS=${TOTAL_EPOCHS:-1}

# The run directory is $SAVE_PATH/$EXPERIMENT_NAME; all nodes use that of node 0.
export PROJECT_NAME=${PROJECT_NAME:-rm-gallery-sft}
export EXPERIMENT_NAME=${EXPERIMENT_NAME:-qwen2.5-7b-sft-${TIMESTAMP}}

exec bash "$HERE/../bradley_terry/run_bt.sh" objective.name=sft "$@"
