"""`hydra/launcher=slurm`: submitit's launcher, whose jobs are requeued from one process, for good.

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

        Before the time-out Slurm sends SIGUSR2, and submitit's handler requeues the job. That
        leaves two ways to lose it, on clusters that signal all processes of a job: workers that
        load data have inherited the handler and requeue as well, at the same moment; and then
        submitit raises SystemExit, while Slurm already ends what the run would need for a clean
        end (its workers, W&B's service), so that the exit becomes an error, and the sweep takes
        the job for a failed one. Hence: the first process only, and an end as if killed.
        """

        def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (as of the parent)
            """Run the job, in the process that Slurm started for it."""
            requeue, job = signal.getsignal(signal.SIGUSR2), os.getpid()

            def requeue_and_end(number: int, frame: FrameType | None) -> None:
                if os.getpid() == job and callable(requeue):
                    try:
                        requeue(number, frame)
                    except SystemExit:  # it is in the queue; else there is another error, or none
                        os._exit(1)

            signal.signal(signal.SIGUSR2, requeue_and_end)
            return super().__call__(*args, **kwargs)
