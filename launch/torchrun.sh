#!/usr/bin/env bash
# One or many nodes with torchrun. Run the same line on every node:
#   GPUS=8 launch/torchrun.sh experiment=stage1_vitg
#   GPUS=8 NODES=4 NODE_RANK=0..3 MASTER=host:29500 launch/torchrun.sh experiment=stage1_vitg
set -euo pipefail
GPUS=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
NODES=${NODES:-1}
if [ "$NODES" -gt 1 ]; then
  rendezvous=(--nnodes "$NODES" --node-rank "${NODE_RANK:?rank of this node, from 0}"
    --rdzv-backend c10d --rdzv-endpoint "${MASTER:?host:port of the first node}")
else
  rendezvous=(--standalone)
fi
exec torchrun "${rendezvous[@]}" --nproc-per-node "$GPUS" --module blip2_train.train "$@"
