#!/usr/bin/env bash
# A real SLURM cluster of virtual nodes on this one machine, for tests (root, Debian or Ubuntu, no systemd needed).
#   cluster.sh up [PID]    start it: nodes node1 .. nodeN, each a network namespace of its own with its own host name and
#                          sshd; with PID it goes down by itself when that process ends in whatever way
#   cluster.sh can         exit code 2: this machine cannot have one (not root, no namespaces, no packages); so has up
#   cluster.sh down        stop it and remove its state
#   cluster.sh on NODE CMD run CMD on a node, or on 'head', where sbatch, srun, squeue ... have to run
#   cluster.sh cut NODE    pull the network cable of a node; join NODE puts it back
#   cluster.sh crash NODE  kill -9 everything on the node; boot NODE starts it again
# Settings by environment: CLUSTER_DIR (state, /tmp/vqmoe-cluster), CLUSTER_NODES (2), CLUSTER_CPUS (2 a node; more than
# the machine has is fine). All nodes share this machine's files.
set -euo pipefail
D=${CLUSTER_DIR:-/tmp/vqmoe-cluster} N=${CLUSTER_NODES:-2} CPUS=${CLUSTER_CPUS:-2} NET=10.78.0
case $D in /*/*) ;; *) echo "cluster.sh: refusing the directory $D" >&2; exit 2 ;; esac
export SLURM_CONF=$D/slurm.conf VQMOE_CLUSTER=$D # the latter marks the daemons as ours
say() { echo "cluster.sh: $*" >&2; }

alive() { [ -n "$(tr -d '\0' 2>/dev/null </proc/"${1:-none}"/cmdline)" ]; } 2>/dev/null # a zombie has no command line

need_packages() {
    local missing=0 program
    for program in munged slurmctld slurmd sbatch ip sshd ssh pdsh; do command -v "$program" >/dev/null || missing=1; done
    [ "$missing" = 1 ] || return 0
    command -v apt-get >/dev/null || {
        say "install SLURM (slurmctld, slurmd, its client), munge, iproute2, sshd and pdsh first"
        exit 2
    }
    say "installing SLURM, munge, sshd and pdsh"
    local policy=/usr/sbin/policy-rc.d made= code=0
    if [ ! -e $policy ]; then # packages shall not start daemons of their own
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && made=1
    fi
    mkdir -p "$D"
    { timeout 60 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 150 apt-get install -y -qq \
        --no-install-recommends munge slurmctld slurmd slurm-client iproute2 openssh-server openssh-client pdsh; } \
        >"$D/apt.log" 2>&1 || code=2
    [ -z "$made" ] || rm -f $policy
    [ $code = 0 ] || { tail -n 5 "$D/apt.log" >&2; say "apt-get could not install SLURM"; exit 2; }
}

as() { # as NODE COMMAND: a shell command with that node's network, host name, /etc/hosts and ssh
    nsenter --net="/run/netns/vqmoe-$1" -- unshare --uts --mount sh -ec '
        mount --bind "$1/hosts" /etc/hosts
        mount --bind "$1/ssh/config" /etc/ssh/ssh_config
        hostname "$2"
        readlink /proc/self/ns/mnt >"$1/run/$2.ns"
        eval "$3"' sh "$D" "$1" "$2"
}

start_node() {
    as "$1" "$(command -v sshd) -f $D/ssh/sshd -E $D/log/sshd-$1.log && exec slurmd -f $D/slurm.conf -N $1"
}

on() { # on NODE COMMAND...
    local file=$D/run/slurmd-$1.pid pid
    [ "$1" != head ] || file=$D/run/slurmctld.pid
    pid=$(cat "$file" 2>/dev/null) || { say "the cluster is not up, or has no $1"; exit 2; }
    shift
    exec nsenter -t "$pid" --net --uts --mount --wdns="$PWD" -- "$@"
}

network() {
    local i
    ip netns add vqmoe-head
    ip -n vqmoe-head link set lo up
    ip -n vqmoe-head link add eth0 type bridge
    ip -n vqmoe-head addr add $NET.1/24 dev eth0
    ip -n vqmoe-head link set eth0 up
    printf '127.0.0.1 localhost\n%s.1 head\n' $NET >"$D/hosts"
    for i in $(seq "$N"); do
        ip netns add "vqmoe-node$i"
        ip -n "vqmoe-node$i" link set lo up
        ip -n vqmoe-head link add "v$i" type veth peer name eth0 netns "vqmoe-node$i"
        ip -n vqmoe-head link set "v$i" master eth0 up
        ip -n "vqmoe-node$i" addr add "$NET.$((10 + i))/24" dev eth0
        ip -n "vqmoe-node$i" link set eth0 up
        echo "$NET.$((10 + i)) node$i" >>"$D/hosts"
    done
}

configure_ssh() { # between the nodes without a password, by keys of this cluster alone
    local key
    mkdir -m 700 "$D/ssh"
    mkdir -p /run/sshd # it insists
    for key in host id; do ssh-keygen -q -t ed25519 -N '' -f "$D/ssh/$key"; done
    printf '%s\n' "HostKey $D/ssh/host" "AuthorizedKeysFile $D/ssh/id.pub" 'StrictModes no' 'PidFile none' >"$D/ssh/sshd"
    printf '%s\n' "IdentityFile $D/ssh/id" 'StrictHostKeyChecking no' 'UserKnownHostsFile /dev/null' 'LogLevel ERROR' \
        >"$D/ssh/config"
}

configure() {
    cat >"$D/slurm.conf" <<CONF
ClusterName=vqmoe
SlurmctldHost=head($NET.1)
SlurmctldPort=17817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A credential lives this long, and a requeued job waits as long (the default is 120 s).
AuthInfo=socket=$D/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$D/ctld
SlurmdSpoolDir=$D/spool/%n
TmpFS=$D/tmp/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,bf_min_age_reserve=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldTimeout=30
SlurmdTimeout=10
BatchStartTimeout=10
KillWait=10
MinJobAge=3600
UnkillableStepTimeout=30
# A node may claim more CPUs than this machine has.
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
    local i
    for i in $(seq "$N"); do
        echo "NodeName=node$i NodeAddr=$NET.$((10 + i)) Port=17818 CPUs=$CPUS RealMemory=8000 State=UNKNOWN"
    done >>"$D/slurm.conf"
    cat >>"$D/slurm.conf" <<CONF
PartitionName=main Nodes=node[1-$N] Default=YES MaxTime=1-0 DefaultTime=10 PriorityTier=1 GraceTime=30 State=UP
PartitionName=urgent Nodes=node[1-$N] MaxTime=1-0 DefaultTime=10 PriorityTier=9 State=UP
CONF
    case $(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -1) in # "disabled" is younger than 22.05; v2 wants systemd
    1* | 20.* | 21.* | 22.*) echo CgroupPlugin=cgroup/v1 ;;
    *) echo CgroupPlugin=disabled ;;
    esac >"$D/cgroup.conf"
}

ready() {
    local idle
    idle=$(on head timeout 5 sinfo -h -N -p main -o '%T' 2>/dev/null | grep -cE '^(idle|mixed|allocated)$') || true
    [ "${idle:-0}" -ge "$N" ]
}

can() {
    [ "$(id -u)" = 0 ] || { say "only root can make network namespaces"; exit 2; }
    unshare --net --uts --mount true 2>/dev/null || { say "this machine lets root make no namespaces"; exit 2; }
    need_packages
}

up() {
    can
    local owner
    owner=$(cat "$D/owner" 2>/dev/null) || true
    ! alive "$owner" || { say "process $owner is using the cluster"; exit 1; }
    down
    mkdir -p "$D"/{munge,ctld,spool,log,run}
    if [ -n "${1:-}" ]; then
        echo "$1" >"$D/owner"
        setsid "$0" guard "$1" </dev/null >/dev/null 2>&1 &
    fi
    chmod 755 "$D" "$D/munge" # munge insists
    trap 'say "failed; the end of the logs:"; tail -n 8 "$D"/log/*.log >&2' ERR
    (umask 077 && head -c 128 /dev/urandom >"$D/munge/key")
    munged --key-file="$D/munge/key" --socket="$D/munge/sock" --pid-file="$D/run/munged.pid" \
        --log-file="$D/log/munged.log" --seed-file="$D/munge/seed" --num-threads=2
    network
    configure
    configure_ssh
    as head "exec slurmctld -f $D/slurm.conf"
    local i
    for i in $(seq "$N"); do
        mkdir -p "$D/spool/node$i" "$D/tmp/node$i"
        start_node "node$i"
    done
    for i in $(seq 150); do
        ! (ready) || return 0
        sleep 0.2
    done
    say "the nodes did not come up"
    tail -n 20 "$D"/log/*.log >&2
    exit 1
}

kill_on() { # every process in the mount namespace of a node
    local ns file
    ns=$(cat "$D/run/$1.ns" 2>/dev/null) || return 0
    for file in $(grep -ls "${D##*/}/hosts /etc/hosts " /proc/[0-9]*/mountinfo 2>/dev/null); do
        file=${file%/mountinfo}
        [ "$(readlink "$file/ns/mnt" 2>/dev/null)" != "$ns" ] || kill -9 "${file#/proc/}" 2>/dev/null || true
    done
}

stop() { # stop PIDFILE: a daemon of this cluster, known by the mark in its environment
    local pid
    pid=$(cat "$1" 2>/dev/null) || return 0
    { tr '\0' '\n' <"/proc/$pid/environ"; } 2>/dev/null | grep -qxF "VQMOE_CLUSTER=$D" || return 0
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 30); do
        alive "$pid" || return 0
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
}

down() {
    [ -d "$D" ] || return 0
    local file
    for file in "$D"/run/slurmctld.pid "$D"/run/slurmd-*.pid; do stop "$file"; done
    for file in "$D"/run/*.ns; do
        file=${file##*/}
        kill_on "${file%.ns}"
    done
    stop "$D/run/munged.pid"
    for file in $(ip netns list 2>/dev/null | grep -oE '^vqmoe-(head|node[0-9]+)'); do ip netns del "$file"; done
    rm -rf "$D"
}

guard() { # guard PID: take the cluster down when that process ends
    while alive "$1"; do sleep 1; done
    [ "$(cat "$D/owner" 2>/dev/null)" != "$1" ] || down
}

case ${1:-} in
can) can ;;
up) up "${2:-}" ;;
guard) guard "$2" ;;
down) down ;;
on) shift && on "$@" ;;
cut) ip -n vqmoe-head link set "v${2#node}" down ;;
join) ip -n vqmoe-head link set "v${2#node}" up ;;
crash) kill_on "$2" ;;
boot) start_node "$2" ;;
*) sed -n 2,9p "$0" >&2 && exit 2 ;;
esac
