"""`hydra/launcher=slurm`: submitit's launcher, with jobs that only one process requeues.

Hydra finds launchers in packages called `hydra_plugins` only.
"""

import contextlib
import os
import signal
from types import FrameType
from typing import Any

with contextlib.suppress(ModuleNotFoundError):  # Hydra imports all of its plugins, asked or not
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

    class RequeuingSlurmLauncher(SlurmLauncher):
        """Puts a job that runs out of time back into the queue; `train.py` resumes it.

        Before the time-out Slurm sends SIGUSR2, and submitit's handler requeues the job. On
        clusters that signal all processes of a job, that can lose the job in two ways. Workers that
        load data have inherited the handler, and requeue the job too, at the same moment. And the
        SystemExit that submitit raises can turn into an error while Slurm ends the processes that
        a clean end of the run would need, so that the sweep takes the job for a failed one. So here
        only the job's first process requeues, and it exits with `os._exit(1)`, as if killed.
        """

        def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (the parent's)
            """Run the job, in the process that Slurm started for it."""
            requeue, job = signal.getsignal(signal.SIGUSR2), os.getpid()

            def requeue_and_end(number: int, frame: FrameType | None) -> None:
                if os.getpid() == job and callable(requeue):
                    try:
                        requeue(number, frame)
                    except SystemExit:  # the job is in the queue, or the requeueing failed
                        os._exit(1)

            signal.signal(signal.SIGUSR2, requeue_and_end)
            return super().__call__(*args, **kwargs)
