"""A trainer of one process that ends by itself, in the way its first argument names."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from internvl_core.contract import METRICS_FILE, CheckpointRef, StageFailure, StageResult

DAEMON = """
import os, signal
if os.fork() == 0:
    os.setsid()
    signal.pause()
"""


def main() -> int:
    directory, ending, *arguments = Path(sys.argv[1]), *sys.argv[2:]
    match ending:
        case "finish":
            finish(directory)
        case "finish-with-daemon":
            subprocess.run([sys.executable, "-c", DAEMON], check=True)
            finish(directory)
        case "return":
            print("nothing to do")
        case "hang":
            signal.pause()
        case "exit":
            return int(arguments[0])
        case "die":
            print("about to die", flush=True)
            os.kill(os.getpid(), signal.Signals[arguments[0]])
        case "fail":
            StageFailure(error=arguments[0], message="step 3: no luck.", rank=1).write_first(directory)
            return 1
        case "chatter":
            for line in range(int(arguments[0])):
                print(f"line {line} {'.' * 80}")
            finish(directory)
        case "echo":
            (directory / "argv.json").write_text(json.dumps(arguments))
            finish(directory)
    return 0


def finish(directory: Path) -> None:
    with (directory / METRICS_FILE).open("a") as file:
        for step in range(1, 4):
            file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
        file.write('{"step": 4, "lo')
    result = StageResult(
        step=3, checkpoint=CheckpointRef("file:///store/step-3", "0" * 64), metrics={}, counters={}, seconds={}
    )
    result.write(directory)


if __name__ == "__main__":
    sys.exit(main())
