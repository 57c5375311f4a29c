"""Start an evaluation of a checkpoint: `torchrun -m internvl_core.evaluation --attempt_dir=... --key=value ...`."""

import time

from internvl_core.train.supervisor_link import SupervisorLink

if __name__ == "__main__":
    started = time.monotonic()
    # Before seconds of imports: a rank without an owner must end, and a stop must be heard.
    link = SupervisorLink.connect()
    link.hear_signals()

    from internvl_core.contract import EVALUATION
    from internvl_core.train.entry import main

    main(EVALUATION, link, started)
