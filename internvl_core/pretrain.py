"""Start a pretrain stage: `torchrun -m internvl_core.pretrain --key=value ...`."""

import time

from internvl_core.train.stop_request import StopRequest

if __name__ == "__main__":
    started = time.monotonic()
    # Before seconds of imports: a rank without an owner must end, and a stop must be heard.
    stop_request = StopRequest.connect()

    from internvl_core.train.entry import main

    main("pretrain", stop_request, started)
