#!/bin/bash
# Train a Bradley-Terry reward model with torchrun, on one machine or several, from any folder.
#
#   bash run_bt.sh [KEY=VALUE ...]
#
# Environment variables override the settings below; KEY=VALUE arguments override both. The configuration is checked
# before torchrun starts, so an error is one sentence and exit status 2. Paths are relative to the working directory.
# CONFIG names another YAML file than the trainer.yaml in this folder.
# slurm.sbatch and kubernetes.yaml in this folder start the script on every machine of a job.

TIMESTAMP=$(date "+%m%dT%H%M")
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(cd "$HERE/../../../.." && pwd)

refuse() {
    echo "${SCRIPT_NAME:-run_bt.sh}: error: $1" >&2
    exit 2
}

# The interpreter: $PYTHON, an activated environment, the environment of this checkout, or python on the PATH.
if [ -z "${PYTHON:-}" ]; then
    for PYTHON in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$CHECKOUT/.venv/bin/python" python python3; do
        command -v "$PYTHON" >/dev/null && break
    done
fi
MISSING=$("$PYTHON" -c '
import sys
from importlib.util import find_spec
names = "numpy", "torch", "transformers", "hydra", "pydantic", "pyarrow"
old = "Python 3.11" if sys.version_info < (3, 11) else ""
print(old or ", ".join(name for name in names if find_spec(name) is None))
') || refuse "$PYTHON cannot be run; set PYTHON to the interpreter of an environment with RM-Gallery"
[ -z "$MISSING" ] || refuse "$PYTHON lacks $MISSING; activate the environment of RM-Gallery, or run pip install -e $CHECKOUT"
# Also works from a checkout that is not installed.
"$PYTHON" -c "import rm_gallery" 2>/dev/null || export PYTHONPATH="$CHECKOUT${PYTHONPATH:+:$PYTHONPATH}"

# Distributed training: one process per GPU, or N_GPUS_PER_NODE processes on the CPU.
# NNODES and NODE_RANK take precedence over WORLD_SIZE and RANK, which some schedulers set instead.
if [ -z "${N_GPUS_PER_NODE:-}" ]; then
    N_GPUS_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
    [ "$N_GPUS_PER_NODE" -gt 0 ] || N_GPUS_PER_NODE=1
fi
NNODES=${NNODES:-${WORLD_SIZE:-1}}
NODE_RANK=${NODE_RANK:-${RANK:-0}}
MAX_RESTARTS=${MAX_RESTARTS:-0} # restarts of all processes by torchrun after a failure

# Model and data
SAVE_PATH=${SAVE_PATH:-./checkpoints/bt}
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-7B-Instruct}
TRAIN_FILE=${TRAIN_FILE:-hendrydong/preference_700K/train.parquet}
VAL_FILE=${VAL_FILE-hendrydong/preference_700K/test.parquet} # empty: no validation

# The run directory is $SAVE_PATH/$EXPERIMENT_NAME; all nodes use that of node 0.
PROJECT_NAME=${PROJECT_NAME:-rm-gallery-bt}
EXPERIMENT_NAME=${EXPERIMENT_NAME:-qwen2.5-7b-bt-${TIMESTAMP}}

SETTINGS=(
    data.train_files="$TRAIN_FILE"
    data.val_files="$VAL_FILE"
    model.partial_pretrain="$MODEL_PATH"
    data.max_length="${MAX_LENGTH:-4096}"
    data.micro_batch_size_per_gpu="${MICRO_BATCH_SIZE_PER_GPU:-1}"
    data.train_batch_size="${TRAIN_BATCH_SIZE:-256}"
    optim.lr="${LR:-5e-7}"
    optim.clip_grad="${CLIP_GRAD:-2}"
    trainer.total_epochs="${TOTAL_EPOCHS:-3}"
    trainer.save_freq="${SAVE_FREQ:-500}"
    trainer.test_freq="${TEST_FREQ:-500}"
    trainer.logger="${LOGGER:-['console','swanlab']}"
    trainer.project_name="$PROJECT_NAME"
    trainer.experiment_name="$EXPERIMENT_NAME"
    trainer.default_local_dir="$SAVE_PATH/$EXPERIMENT_NAME"
    "$@"
)

for NAME in N_GPUS_PER_NODE NNODES NODE_RANK MAX_RESTARTS; do
    [[ ${!NAME} =~ ^[0-9]+$ ]] || refuse "$NAME=${!NAME} is not a number"
done
[ "$NNODES" -gt 0 ] && [ "$N_GPUS_PER_NODE" -gt 0 ] || refuse "NNODES and N_GPUS_PER_NODE must be at least 1"
[ "$NODE_RANK" -lt "$NNODES" ] || refuse "NODE_RANK=$NODE_RANK with NNODES=$NNODES: nodes count from 0 to $((NNODES - 1))"
if [ "$NNODES" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
    refuse "NNODES=$NNODES needs MASTER_ADDR, the address of node 0, on every node"
fi

# Rendezvous: a free port of this machine, unless a port is set or there are several machines.
if [ "$NNODES" -eq 1 ] && [ -z "${MASTER_PORT:-}" ]; then
    RENDEZVOUS=(--standalone)
else
    RENDEZVOUS=(--node_rank="$NODE_RANK" --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}")
fi

# Threads per process; torchrun defaults to one.
CORES=$(nproc 2>/dev/null || echo 1)
THREADS=$((CORES / N_GPUS_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((THREADS > 0 ? THREADS : 1))}

# The check runs in one process, without the rank variables of the workers.
env -u RANK -u WORLD_SIZE -u LOCAL_RANK "$PYTHON" -m rm_gallery.cli validate-config \
    --config "${CONFIG:-$HERE/trainer.yaml}" "${SETTINGS[@]}" || exit $?

set -x
exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$NNODES" \
    --nproc_per_node="$N_GPUS_PER_NODE" \
    --max_restarts="$MAX_RESTARTS" \
    "${RENDEZVOUS[@]}" \
    "$HERE/trainer.py" \
    ${CONFIG:+--config "$CONFIG"} \
    "${SETTINGS[@]}"
