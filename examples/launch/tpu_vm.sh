#!/usr/bin/env bash
# A slice of TPU VMs, e.g. v5p-64 (8 hosts of 4 chips), inference_mode: host_data_parallel: every host runs its own four
# chips as a slice of one host and its own share of the prompts; nothing passes between hosts.
#
#   examples/launch/tpu_vm.sh NAME ZONE sampler.yaml
#
# Each VM's own TPU_WORKER_ID and TPU_WORKER_HOSTNAMES say which host it is; they are read before pagoda hides the other
# hosts from libtpu (it prints what it sets). This has not run on TPU hardware.
set -euo pipefail
name=$1 zone=$2 config=$3

on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"; }

gcloud compute tpus tpu-vm scp "$config" "$name:sampler.yaml" --zone "$zone" --worker=all
on_all 'source /etc/profile; pagoda sample --config sampler.yaml --plugin tpu --out run'

# Each VM holds its own share: bring them together, then join them.
hosts=$(gcloud compute tpus tpu-vm describe "$name" --zone "$zone" --format 'value(networkEndpoints.len())')
for ((host = 0; host < hosts; host++)); do
  gcloud compute tpus tpu-vm scp "$name:run/host_*" run/ --zone "$zone" --worker="$host"
done
pagoda merge run
