#!/bin/bash
# A run over one or several machines by torchrun. One machine:   launch/torchrun.sh comm-7b --data.root data --out runs/comm
# Several, on each of them:   NODES=2 HEAD=node0:29500 launch/torchrun.sh comm-7b --data.root data --out runs/comm
# GPUS: processes on each machine (all its GPUs by default). The folder of --out must be seen by all machines.
set -euo pipefail
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
if [ "${NODES:-1}" -gt 1 ]; then
  meeting=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "${HEAD:?the first machine as name:port}" --rdzv-id "${RUN:-commvlm}")
else
  meeting=(--standalone)
fi
exec torchrun "${meeting[@]}" --nproc-per-node "$((gpus > 0 ? gpus : 1))" -m commvlm.cli train "$@"
