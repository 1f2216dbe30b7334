#!/usr/bin/env bash
# Proves `hydra/launcher=slurm` on a real Slurm of one node: a sweep whose jobs are cut off by their
# time limit, and requeued, ends with the same results as one whose jobs are not, bit for bit.
#
#   tests/prove_slurm.sh [PYTHON]     as root on Debian; ten minutes, on slow cores half an hour
#
# PYTHON (python) has the project and its extra `slurm`. Slurm comes from Debian's packages, if it is
# missing. Its configuration, key and logs, the data and the runs are in one new folder, which is
# deleted at the end unless something failed; the daemons are ended in any case.
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() { echo "refused: $1" >&2; exit 2; }
step() { printf '\n== %s  %s\n' "$(date +%T)" "$*"; }

python=$(command -v "${1:-python}") || refuse "${1:-python}: no such command"
[ "$(id -u)" = 0 ] || refuse "needs root, for Slurm's packages and daemons"
if [ -n "${SLURM_CONF:-}" ] || [ -e /etc/slurm/slurm.conf ] ||
  pgrep -x --runstates R,S,D,I 'slurm.*' > /dev/null; then
  refuse "there is a Slurm here already"
fi
"$python" -c "import hydra_plugins.hydra_submitit_launcher" 2> /dev/null ||
  refuse "needs the launcher: pip install -e '.[slurm]'"

for command in slurmctld slurmd sbatch munged; do
  command -v $command > /dev/null && continue
  step "Slurm from Debian's packages"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge > /dev/null
  break
done

work=$(mktemp -d /var/tmp/prove_slurm.XXXXXX)
chmod 755 "$work"                             # munge's socket must be in reach of every user
mkdir -m 755 "$work"/{state,spool,munge}
finish() {
  status=$?
  scancel --user=root 2> /dev/null
  for _ in $(seq 60); do [ -z "$(squeue -h 2> /dev/null)" ] && break || sleep 1; done
  for daemon in slurmd slurmctld munged; do
    [ ! -s "$work/$daemon.pid" ] || kill "$(cat "$work/$daemon.pid")"
  done
  if [ $status = 0 ]; then rm -rf "$work"; else echo "failed; logs and runs: $work" >&2; fi
}
trap 'set +e; finish' EXIT
trap 'exit 130' INT TERM

step "one node"
export SLURM_CONF=$work/slurm.conf
cores=$(getconf _NPROCESSORS_ONLN)
memory_mb=$(($(getconf _PHYS_PAGES) / 1024 * $(getconf PAGE_SIZE) / 1024))
cat > "$SLURM_CONF" <<END
ClusterName=proof
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$work/munge/socket,cred_expire=10  # a requeued job waits so long, in seconds
MpiDefault=none
ProctrackType=proctrack/linuxproc  # needs no cgroups, and signals every process of a job
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory_mb
PartitionName=proof Nodes=ALL Default=YES MaxTime=INFINITE
END
(umask 077 && head -c 128 /dev/urandom > "$work/munge/key")
munged --key-file="$work/munge/key" --socket="$work/munge/socket" --pid-file="$work/munged.pid" \
  --log-file="$work/munge/log" --seed-file="$work/munge/seed"
slurmctld
slurmd
for _ in $(seq 60); do [ "$(sinfo -h -o %T)" = idle ] && break || sleep 1; done
sinfo --version
sinfo
[ "$(sinfo -h -o %T)" = idle ]

step "phantoms"
"$python" -m datamodules.phantom "$work/phantoms" --cases 4 --spacing-mm 3 > /dev/null

# sweep FOLDER [OVERRIDE...]: group and batch norm on small patches, one core each.
sweep() {
  local folder=$work/$1
  shift
  timeout 3600 "$python" train.py -m hydra/launcher=slurm hydra.sweep.dir="$folder" \
    hydra.launcher.cpus_per_task=1 hydra.launcher.mem_gb=2 \
    model=aeunet norm=group,batch model.bottleneck=4 \
    data.data_set.root="$work/phantoms" data.data_set.spacing_mm=3 data.data_set.count=4 \
    data.cache.root="$work/cache" split.validation=0.25 split.test=0.25 \
    patches.size=16 patches.per_epoch=4 callbacks.early_stopping.patience=100000 \
    trainer.accelerator=cpu +trainer.enable_progress_bar=false "$@" > "$folder.log" 2>&1 ||
    { tail -n 30 "$folder.log" >&2; return 1; }
  ls "$folder"/*/results.json
}

step "a sweep of two jobs"
SECONDS=0
sweep short trainer.max_epochs=6
took_s=$SECONDS

# The limit leaves an attempt more time than all of that took; the training lasts about twice as long.
# Slurm counts in minutes and may signal up to one of them too early.
minutes=$((took_s / 60 + 2))
epochs=$("$python" -c "
import json, sys
runs = [json.load(open(path)) for path in sys.argv[2:]]
print(round(120 * int(sys.argv[1]) / min(run['fit_s'] / run['epochs'] for run in runs)))
" "$minutes" "$work"/short/*/results.json)

step "$epochs epochs without a limit"
sweep whole trainer.max_epochs="$epochs"

step "the same in attempts of $minutes minutes, with a worker that loads data"
sweep cut trainer.max_epochs="$epochs" data.num_workers=1 \
  hydra.launcher.timeout_min="$minutes" hydra.launcher.signal_delay_s=30

step "what happened to the jobs"
grep -hE 'signal SIGUSR2|Requeued|Restored all states|completed successfully|Starting with' \
  "$work"/cut/.submitit/*/*_log.out | grep -v '^\[.*submitit' | cut -c 1-150
for log in "$work"/cut/.submitit/*/*_0_log.out; do
  grep -q 'Restored all states from the checkpoint' "$log" || { echo "$log: never cut off"; exit 1; }
done

step "the same results?"
"$python" - "$work/whole" "$work/cut" <<'END'
import sys
from pathlib import Path

import torch

from experiments.results import Results
from experiments.run import finished_runs
from lightning_modules.checkpoint import read

whole, cut = (finished_runs(Path(folder)) for folder in sys.argv[1:])
assert [run.path.name for run in whole] == [run.path.name for run in cut]
assert len(whole) == 2
for a, b in zip(whole, cut, strict=True):
    one, other = Results.read(a), Results.read(b)
    assert one.metrics == other.metrics, (one.metrics, other.metrics)
    assert one.epochs == other.epochs
    weights, others = (read(run.last)["state_dict"] for run in (a, b))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    print(f"{one.run}: {len(one.metrics)} metrics and {len(weights)} tensors are identical,",
          f"test/dice {one.metrics['test/dice']!r} after {one.epochs} epochs")
END
step "proved"
