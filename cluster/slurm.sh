#!/usr/bin/env bash
# One job on a Ray of its own, over all nodes of a Slurm allocation:
#   sbatch --nodes 4 --gpus-per-node 1 --time 12:00:00 cluster/slurm.sh python jobs/score.py my_score.yaml
# Submit from the repository's root, with the environment that has dede_ray active, on a file system that all nodes see;
# outputs go there too. Three minutes before the time is up, and when the nodes are wanted by others, Ray
# drains (training then saves) and the job is put back into the queue; when it starts again, it resumes.
# Tried with stand-ins for Slurm's commands; not run on a Slurm cluster so far.
#SBATCH --job-name=dede_ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dede_ray-%j.log
#SBATCH --signal=B:USR1@180
set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch cluster/slurm.sh <command of a job ...>" >&2
    exit 2
fi

port=${RAY_PORT:-6379}
dashboard_port=${RAY_DASHBOARD_PORT:-8265}
client_port=${RAY_CLIENT_PORT:-10001}
metrics_port=${RAY_METRICS_PORT:-8080}
wait_s=${RAY_START_WAIT_S:-300}
# Short, as sockets' paths are, and on each node's own disk.
temporary=${RAY_TEMPORARY:-/tmp/ray_$SLURM_JOB_ID}
# Seconds between the notice and the end of a node; together with the rest less than the 180 above.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-60}
export RAY_USAGE_STATS_ENABLED=0

# Other people work on these machines too: only who has the token, in our home folder, can use our Ray.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [[ $RAY_AUTH_MODE == token ]]; then
    ray get-auth-token --generate >/dev/null
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# The first IPv4 address of the head, as the other nodes see it.
ip=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | tr ' ' '\n' | grep -m1 -F .)
export RAY_ADDRESS=$ip:$port
steps=()
job=

# Runs on every node: Ray with the CPUs that Slurm gave us there, not with all that the machine has.
# shellcheck disable=SC2016
start='exec ray start --block --num-cpus="$SLURM_CPUS_ON_NODE" "$@"'

on_nodes() { # <number of nodes> <their names> <options of ray start ...>
    local number=$1 names=$2
    shift 2
    srun --overlap --nodes="$number" --ntasks="$number" --ntasks-per-node=1 --nodelist="$names" \
        --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none --kill-on-bad-exit=0 bash -c "$start" ray "$@" &
    steps+=($!)
}

# shellcheck disable=SC2329  # the traps call the next three
signal_all() { # <signal> <processes ...>: ends well for those that are gone
    local signal=$1
    shift
    for process in "$@"; do
        kill -s "$signal" "$process" 2>/dev/null || true
    done
}

# shellcheck disable=SC2329
finish() {
    signal_all TERM "$job" "${steps[@]}"
    wait "${steps[@]}" 2>/dev/null || true
}

# shellcheck disable=SC2329
go_again() {
    trap '' USR1 TERM
    echo "slurm.sh: the nodes are wanted; draining for at most $RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S s" >&2
    signal_all TERM "${steps[@]}"
    local end=$((SECONDS + RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S))
    while ((SECONDS < end)) && kill -0 "$job" 2>/dev/null; do
        sleep 1
    done
    trap - EXIT
    if ! kill -0 "$job" 2>/dev/null && wait "$job"; then
        echo "slurm.sh: the job had already finished" >&2
        exit 0
    fi
    signal_all TERM "$job"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap finish EXIT
trap go_again USR1 TERM

on_nodes 1 "$head" --head --node-ip-address="$ip" --port="$port" --dashboard-port="$dashboard_port" \
    --ray-client-server-port="$client_port" --metrics-export-port="$metrics_port" --temp-dir="$temporary"
ready=0
for ((waited = 0; waited < wait_s; waited++)); do
    if ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1; then
        ready=1
        break
    fi
    kill -0 "${steps[0]}" 2>/dev/null || break
    sleep 1
done
if ((!ready)); then
    echo "slurm.sh: Ray's head did not start on $head within $wait_s s" >&2
    exit 1
fi

if ((${#nodes[@]} > 1)); then
    rest=$(IFS=, && echo "${nodes[*]:1}")
    on_nodes $((${#nodes[@]} - 1)) "$rest" --address="$RAY_ADDRESS"
fi
# A job looks at the cluster once, when it starts: let it find all nodes.
python - "${#nodes[@]}" "$wait_s" <<'PYTHON'
import logging
import sys
import time

import ray

expected, wait_s = map(int, sys.argv[1:])
ray.init(logging_level=logging.ERROR, log_to_driver=False)
deadline = time.monotonic() + wait_s
while (alive := sum(node["Alive"] for node in ray.nodes())) < expected:
    if time.monotonic() > deadline:
        sys.exit(f"slurm.sh: {alive} of {expected} nodes joined Ray within {wait_s} s")
    time.sleep(0.5)
PYTHON

echo "slurm.sh: Ray on ${#nodes[@]} nodes at $RAY_ADDRESS; running: $*" >&2
"$@" &
job=$!
code=0
wait "$job" || code=$?
exit "$code"
