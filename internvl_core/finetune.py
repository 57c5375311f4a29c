"""Start a finetune stage: `torchrun -m internvl_core.finetune --key=value ...`."""

from internvl_core.train.stop_request import StopRequest

if __name__ == "__main__":
    # Before seconds of imports: a rank without an owner must end, and a stop must be heard.
    stop_request = StopRequest.connect()

    from internvl_core.train.run import main

    main("finetune", stop_request)
