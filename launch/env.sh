# shellcheck shell=bash
# Environment that every launch of a training shares; source it. What each line is for:

# launchers die at these signals and leave the ranks behind, unless told to pass them on; the run answers with a checkpoint
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1,SIGUSR2
# those of a terminal's end and of Ctrl-\, unless they are ignored here, as under nohup: then the run outlives the terminal
for signal in SIGHUP SIGQUIT; do
    [ -n "$(trap -p "$signal")" ] || PET_SIGNALS_TO_HANDLE+=,$signal
done
unset signal
# seconds that ranks get for that checkpoint before they are killed
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
