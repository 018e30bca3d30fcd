# What the scripts beside this file share; they read it inside a job, after finding VQMOE_ROOT.
#
# Environment of the ranks, whichever variables are set:
#   VQMOE_MODULES     modules to load, separated by spaces
#   VQMOE_VENV        virtual environment to activate
#   VQMOE_CONTAINER   words to put before python, such as "apptainer exec --nv image.sif"
# Behaviour:
#   VQMOE_LAUNCH      srun (default): SLURM starts every rank; torchrun: it starts one torchrun a node (node.py)
#   VQMOE_REQUEUE     1 (default): the job requeues itself after a signal or a lost rank; 0: it ends with 0 instead, so
#                     that the next job of a chain goes on
#   VQMOE_WAIT        seconds after the end of the first rank in which the others may end by themselves (default 30)
#   VQMOE_STUCK       requeues without a new checkpoint in between after which the job gives up (default 3)

refuse() { # with one sentence; nothing goes on in the wrong environment
    echo "error: $*" >&2
    exit 2
}

for name in VQMOE_WAIT VQMOE_STUCK; do
    # What is no number would fail only at the end, and a job that cannot count its requeues would go on for ever.
    case ${!name:-0} in *[!0-9]* | ?????????*) refuse "$name=${!name} is not a whole number of at most 8 digits" ;; esac
done
case ${VQMOE_REQUEUE:-1} in 0 | 1) ;; *) refuse "VQMOE_REQUEUE=$VQMOE_REQUEUE is unknown; it is 1 or 0" ;; esac

if [ -n "${VQMOE_MODULES:-}" ]; then
    for script in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh "${LMOD_PKG:-/usr/share/lmod/lmod}/init/bash"; do
        # A job's shell is no login shell, and may not have the command.
        if ! type module >/dev/null 2>&1 && [ -r "$script" ]; then . "$script"; fi
    done
    type module >/dev/null 2>&1 || refuse "VQMOE_MODULES=$VQMOE_MODULES, and there is no command module here"
    # shellcheck disable=SC2086
    module load $VQMOE_MODULES || refuse "VQMOE_MODULES=$VQMOE_MODULES could not be loaded; module avail lists what is there"
fi
if [ -n "${VQMOE_VENV:-}" ]; then
    [ -r "$VQMOE_VENV/bin/activate" ] || refuse "there is no virtual environment in VQMOE_VENV=$VQMOE_VENV"
    . "$VQMOE_VENV/bin/activate" || refuse "the virtual environment in VQMOE_VENV=$VQMOE_VENV cannot be activated"
fi
read -r container _ <<<"${VQMOE_CONTAINER:-}"
[ -z "$container" ] || command -v "$container" >/dev/null || refuse "VQMOE_CONTAINER: there is no command $container here"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# Start the ranks: ranks SCRIPT ARGUMENT... . A signal to the batch script goes on to every rank.
# Ranks that are left behind by the first are not ended at once, so that they may say who is missing.
ranks() {
    local nodes=$SLURM_JOB_NUM_NODES cpus=${SLURM_CPUS_PER_TASK:-1} shape=() launch=() ranks
    if [ "${VQMOE_LAUNCH:-srun}" = torchrun ]; then
        ranks=$((SLURM_NTASKS / nodes))
        cpus=$((cpus * ranks))
        shape=(--ntasks="$nodes" --ntasks-per-node=1)
        launch=("$VQMOE_ROOT/launchers/slurm/node.py" --nproc_per_node "$ranks")
    elif [ "${VQMOE_LAUNCH:-srun}" != srun ]; then
        refuse "VQMOE_LAUNCH=$VQMOE_LAUNCH is unknown; it is srun or torchrun"
    fi
    # srun does not take --cpus-per-task over from sbatch.
    # shellcheck disable=SC2086
    srun "${shape[@]}" --kill-on-bad-exit=0 --wait="${VQMOE_WAIT:-30}" --cpus-per-task="$cpus" \
        ${VQMOE_CONTAINER:-} python "${launch[@]}" "$@" &
    follow $! USR1
}

# follow PID SIGNAL: wait for a child and return its code; USR1 and TERM to this script reach it as SIGNAL.
follow() {
    local interrupted code
    trap "interrupted=1; kill -$2 $1 2>/dev/null" USR1 TERM
    while :; do # wait returns at a signal as well
        interrupted=0
        wait "$1"
        code=$?
        [ $interrupted = 1 ] || return $code
    done
}

# The value of an option among the arguments: option NAME DEFAULT ARGUMENT...
option() {
    local name=$1 value=$2
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
        "$name") value=${2:-} ;;
        "$name"=*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s\n' "$value"
}

# train SCRIPT ARGUMENT...: start the ranks of a training, and end or requeue the job as their exit code wants it.
train() {
    local run_dir
    run_dir=$(option --run_dir '' "$@")
    if [ -z "$run_dir" ]; then
        refuse "give --run_dir, so that a requeued job finds its run again"
    fi
    report=$(report_of "$run_dir")
    ranks "$@"
    finish $? "$run_dir"
}

# report_of RUN_DIR: tells the report of a finished run from another one, or from none.
report_of() {
    stat -c '%i %Y %s' "$1/summary.json" 2>/dev/null
}

# finish CODE RUN_DIR: end the job, or requeue it where going on makes sense. 75 is a signal after saving, 76 a missing
# rank, and over 128 a signal killed a rank.
finish() {
    local code=$1 state=$2/requeue.state job=$SLURM_JOB_ID newest stuck=0 last=
    if [ "$code" -ne 75 ] && [ "$code" -ne 76 ] && [ "$code" -le 128 ]; then exit "$code"; fi
    # The report is the last that a run writes: what killed a rank on its way out took nothing along.
    if [ -n "${report+set}" ] && [ "$(report_of "$2")" != "$report" ]; then
        echo "a rank ended with code $code after the run was finished: nothing is lost"
        exit 0
    fi
    # One task of an array bears the array's own number, by which SLURM means all of them.
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    # Whoever cancels a job means it: only one that SLURM takes for running may come back.
    case $(scontrol show job "$job") in *JobState=RUNNING*) ;; *) exit "$code" ;; esac
    # A fine-tuning has a folder of checkpoints for every one of its runs.
    newest=$(find "$2" -path '*/checkpoints/latest' -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -1 | cut -d ' ' -f 2-)
    newest=${newest:+${newest%latest}$(cat "$newest")}
    [ ! -e "$state" ] || read -r stuck last <"$state"
    case $stuck in '' | *[!0-9]* | ??????*) stuck=0 ;; esac # arithmetic would run what stands there
    stuck=$((10#$stuck))
    if [ "$newest" = "$last" ]; then stuck=$((stuck + 1)); else stuck=0; fi
    if ! { mkdir -p "$2" && echo "$stuck $newest" >"$state"; }; then
        echo "error: stopped with code $code, and $state cannot be written; not requeued" >&2
        exit "$code"
    fi
    if [ "$stuck" -gt "${VQMOE_STUCK:-3}" ]; then
        echo "error: stopped with code $code after $stuck starts without a new checkpoint in $2; not requeued" >&2
        exit "$code"
    fi
    if [ "${VQMOE_REQUEUE:-1}" = 0 ]; then exit 0; fi
    echo "exit code $code: requeued, to go on from ${newest:-the start}"
    trap '' USR1
    trap - TERM # which the requeue sends: a script that ignored it would be waited for
    scontrol requeue "$job" || exit "$code"
    sleep 120
    exit "$code"
}
