"""One of several processes that train together: what `train.launch` starts."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys

from pipeline import files, log
from pipeline.config import UserError
from pipeline.local import die_with_parent
from pipeline.stage import Attempt
from pipeline.stop import EXIT_STOPPED, StopFlag, Stopped
from train import launch
from train.settings import TrainSettings
from train.watchdog import Heart


def main() -> int:
    """Do this rank's part of the attempt on standard input; returns the exit code."""
    die_with_parent()
    stop = StopFlag().install()
    log.configure(stamped=True)
    attempt: Attempt = pickle.load(sys.stdin.buffer)
    attempt.stop = stop
    settings: TrainSettings = attempt.settings
    place = launch.place(os.environ)
    assert place is not None
    hearts = attempt.run.stage_folder("train") / "heartbeats"
    end = launch.end_path(hearts, place.rank)
    try:
        with Heart(hearts, place.rank, settings.hang_timeout_s) as heart:
            from train.loop import train

            stats = train(attempt, heart)
    except Stopped as stopped:
        files.write_atomic(end, json.dumps({"stopped": str(stopped)}))
        return EXIT_STOPPED
    except Exception as error:
        known = isinstance(error, UserError)
        logging.error("%s", error, exc_info=not known)
        said = str(error) if known else f"{type(error).__name__}: {error}"
        files.write_atomic(end, json.dumps({"error": said}))
        sys.stderr.flush()
        # Not through the interpreter's end, where threads that wait for the other ranks may hang.
        os._exit(error.exit_code if isinstance(error, UserError) else 1)
    files.write_atomic(end, json.dumps({"stats": stats.to_json()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
