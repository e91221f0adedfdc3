# shellcheck shell=bash
# Environment that every launch of a training shares; source it. What each line is for:

# launchers die at these signals and leave the ranks behind, unless told to pass them on; the run answers with a checkpoint
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2
# seconds that ranks get for that checkpoint before they are killed
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
