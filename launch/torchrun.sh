#!/usr/bin/env bash
# One or many nodes with torchrun. Run the same line on every node:
#   launch/torchrun.sh experiment=stage1_vitg data=coco
#   NODES=4 MASTER=host0:29500 launch/torchrun.sh experiment=stage1_vitg
# GPUS=N starts N processes per node (default: one per GPU; without a GPU one).
# RESTARTS=N starts all of them anew, up to N times, after one has failed.
set -euo pipefail
GPUS=${GPUS:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
[ "$GPUS" -gt 0 ] || GPUS=1
if [ "${NODES:-1}" -gt 1 ]; then
  # the nodes meet at MASTER, host:port of any of them; a port that firewalls let through
  rendezvous=(--nnodes "$NODES" --rdzv-id "${RUN_ID:-blip2-train}"
    --rdzv-backend c10d --rdzv-endpoint "${MASTER:?host:port of one of the nodes}")
else
  rendezvous=(--rdzv-backend c10d --rdzv-endpoint localhost:0) # any free port
fi
# torchrun passes these on to the processes, which save; then it kills what is left
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
exec torchrun "${rendezvous[@]}" --nproc-per-node "$GPUS" --max-restarts "${RESTARTS:-0}" \
  --module blip2_train.train "$@"
