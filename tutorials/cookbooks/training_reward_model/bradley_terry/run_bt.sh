#!/bin/bash
# Train a Bradley-Terry reward model with torchrun, from any folder.
#
#   bash run_bt.sh [KEY=VALUE ...]
#
# Every setting below can come from the environment; KEY=VALUE arguments win over both. The configuration is checked
# before torchrun starts, so a mistake ends with one sentence and status 2. Relative paths start where you stand.

TIMESTAMP=$(date "+%m%dT%H%M")
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python}

# Distributed training: NNODES and NODE_RANK win over WORLD_SIZE and RANK, which some schedulers set instead.
if [ -z "${N_GPUS_PER_NODE:-}" ]; then
    N_GPUS_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
    [ "$N_GPUS_PER_NODE" -gt 0 ] || N_GPUS_PER_NODE=1  # no GPU: one process on the CPU
fi
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
NNODES=${NNODES:-${WORLD_SIZE:-1}}
NODE_RANK=${NODE_RANK:-${RANK:-0}}

# Model and data
SAVE_PATH=${SAVE_PATH:-./checkpoints/bt}
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-7B-Instruct}
TRAIN_FILE=${TRAIN_FILE:-hendrydong/preference_700K/train.parquet}
VAL_FILE=${VAL_FILE-hendrydong/preference_700K/test.parquet}

PROJECT_NAME=${PROJECT_NAME:-rm-gallery-bt}
EXPERIMENT_NAME=${EXPERIMENT_NAME:-qwen2.5-7b-bt-${TIMESTAMP}}

SETTINGS=(
    data.train_files="$TRAIN_FILE"
    data.val_files="$VAL_FILE"
    model.partial_pretrain="$MODEL_PATH"
    data.max_length=4096
    data.micro_batch_size_per_gpu=1
    data.train_batch_size=256
    optim.lr=5e-7
    optim.clip_grad=2
    trainer.total_epochs=3
    trainer.save_freq=500
    trainer.test_freq=500
    trainer.logger="${LOGGER:-['console','swanlab']}"
    trainer.project_name="$PROJECT_NAME"
    trainer.experiment_name="$EXPERIMENT_NAME"
    trainer.default_local_dir="$SAVE_PATH/$EXPERIMENT_NAME"
    "$@"
)

# The workers' rank variables must not reach the check, which is one process.
env -u RANK -u WORLD_SIZE -u LOCAL_RANK "$PYTHON" -m rm_gallery.cli validate-config \
    --config "$HERE/trainer.yaml" "${SETTINGS[@]}" || exit $?

set -x
exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$NNODES" \
    --nproc_per_node="$N_GPUS_PER_NODE" \
    --node_rank="$NODE_RANK" \
    --master_addr="$MASTER_ADDR" \
    --master_port="$MASTER_PORT" \
    "$HERE/trainer.py" \
    "${SETTINGS[@]}"
