#!/usr/bin/env bash
# A Slurm of its own on this machine: munge, one controller and two node daemons.
#
#   tests/cluster/slurm.sh start FOLDER     prints the SLURM_CONF to export
#   tests/cluster/slurm.sh stop FOLDER
#
# FOLDER holds keys, sockets, state and logs; a service that the machine may run is not touched.
# Debian: apt-get install -y --no-install-recommends slurm-wlm munge
set -euo pipefail

usage() {
  echo "usage: $0 {start|stop} FOLDER" >&2
  exit 64
}
[ $# = 2 ] || usage
action=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
conf=$folder/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

configure() {
  local cpus memory name
  cpus=$(nproc)
  memory=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
  name=$(hostname -s)
  cat >"$conf" <<CONF
ClusterName=tlseg-test
SlurmctldHost=$name(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
SlurmctldPort=17817
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
NodeName=node[1-2] NodeHostname=$name NodeAddr=127.0.0.1 Port=[17831-17832] CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
  mkdir -p "$folder/state" "$folder/spool-node1" "$folder/spool-node2"
  configure
  chmod 755 "$folder"
  if [ ! -s "$folder/munge.key" ]; then
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
  fi
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
    --seed-file="$folder/munged.seed"
  slurmctld -f "$conf"
  export SLURM_CONF=$conf
  local node
  for node in node1 node2; do slurmd -N "$node" -f "$conf"; done
  for _ in $(seq 60); do
    if [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null | tr -d ' ')" = 2 ]; then
      echo "SLURM_CONF=$conf"
      return 0
    fi
    sleep 1
  done
  echo "the two nodes were not idle within a minute; see $folder/*.log" >&2
  sinfo >&2 || true
  exit 1
}

stop() {
  local file
  [ -s "$conf" ] && SLURM_CONF=$conf scancel --user "$(id -un)" 2>/dev/null || true
  for file in slurmd-node1.pid slurmd-node2.pid slurmctld.pid munged.pid; do
    [ -s "$folder/$file" ] && kill "$(cat "$folder/$file")" 2>/dev/null || true
  done
}

case $action in
  start) start ;;
  stop) stop ;;
  *) usage ;;
esac
