#!/usr/bin/env bash
# A Slurm of its own on this machine: munge, one controller and two node daemons.
#
#   tests/cluster/slurm.sh FOLDER     prints the SLURM_CONF to export, and runs until it is ended
#
# FOLDER holds keys, sockets, state and logs. Everything runs in a process name space of its own: no
# signal that Slurm sends reaches another process of the machine, and all of it ends with this script.
# Needs root. Debian: apt-get install -y --no-install-recommends slurm-wlm munge
set -euo pipefail

inside=no
[ "${1:-}" = --inside ] && inside=yes && shift
[ $# = 1 ] || { echo "usage: $0 FOLDER" >&2; exit 64; }
if [ $inside = no ]; then
  mkdir -p "$1"
  unshare --pid --mount --fork true 2>/dev/null ||
    { echo "skip: no process name space can be made here (unshare --pid needs root)" >&2; exit 77; }
  exec unshare --pid --fork --kill-child --mount-proc -- "$0" --inside "$1"
fi
folder=$(cd "$1" && pwd)
conf=$folder/slurm.conf
export SLURM_CONF=$conf PATH=$PATH:/usr/sbin:/sbin

configure() {
  local cpus memory name port
  cpus=$(nproc)
  memory=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
  name=$(hostname -s)
  port=$((10000 + RANDOM % 9000))
  # cred_expire: how long a requeued task waits; 120 s by default.
  cat >"$conf" <<CONF
ClusterName=tlseg-test
SlurmctldHost=$name(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=$port
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdSpoolDir=$folder/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
ReturnToService=2
SlurmdTimeout=300
KillWait=5
MinJobAge=3600
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=node[1-2] NodeHostname=$name NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
CONF
}

mkdir -p "$folder/state" "$folder/spool-node1" "$folder/spool-node2"
chmod 755 "$folder"
configure
[ -s "$folder/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
munged --force --foreground --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
  --seed-file="$folder/munged.seed" >"$folder/munged.out" 2>&1 &
for _ in $(seq 100); do [ -S "$folder/munge.socket" ] && break; sleep 0.1; done
slurmctld -D -f "$conf" >"$folder/slurmctld.out" 2>&1 &
for node in node1 node2; do slurmd -D -N "$node" -f "$conf" >"$folder/$node.out" 2>&1 & done
for _ in $(seq 120); do
  if [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null | tr -d ' ')" = 2 ]; then
    echo "SLURM_CONF=$conf"
    wait
    exit 1
  fi
  sleep 0.5
done
echo "the two nodes were not idle within a minute; see $folder/*.log" >&2
sinfo >&2 || true
exit 1
