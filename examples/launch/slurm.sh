#!/usr/bin/env bash
# Several hosts through Slurm: one process a node, each with its share of the prompts. `srun` says which is which
# (SLURM_PROCID of SLURM_STEP_NUM_TASKS). The folder OUT is one that all nodes see; without one, give each node a local
# folder and copy host_*_of_* together before `pagoda merge`.
#
#   sbatch --nodes 8 examples/launch/slurm.sh sampler.yaml /shared/run1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
# A requeued job goes on where it was: finished samples are in the journal.
set -euo pipefail
config=$1 out=$2

srun --kill-on-bad-exit=0 pagoda sample --config "$config" --out "$out"
pagoda merge "$out"

# CPU nodes as one mesh (the model sharded over them) instead: a build with `--features mpi`, inference_mode: global_mesh in
# the config, and Slurm's own MPI plugin:
#   srun --mpi=pmix pagoda sample --config "$config" --mesh data=4,model=2 --out "$out"
