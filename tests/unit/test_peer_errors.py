"""What torch raises in the ranks that stay when one is gone is a symptom; the same class for a fault here is none."""

import pytest
import torch.distributed as dist

from internvl_core.train.entry import _is_about_a_peer

NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, "


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError(
            f"{NCCL}remote process exited or there was a network error, NCCL version 2.27.5\n"
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
        ),
        dist.DistBackendError(f"{NCCL}unhandled system error: Call to recv failed : Connection reset by peer"),
        dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=ALLREDUCE)"),
        dist.DistNetworkError("The client socket has timed out after 600000ms while trying to connect"),
        dist.DistNetworkError("Connection reset by peer"),
        RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:4711"),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation"),
    ],
)
def test_a_partner_that_is_gone_is_recognised(error: BaseException) -> None:
    assert _is_about_a_peer(error)


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError(
            f"{NCCL}invalid usage: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 2000"
        ),
        dist.DistBackendError(f"{NCCL}internal error: Bootstrap : no socket interface found"),
        dist.DistNetworkError(
            "The server socket has failed to bind to [::]:29500 (errno: 98 - Address already in use)"
        ),
        RuntimeError("shape '[2, 3]' is invalid for input of size 5"),
        ValueError("Connection closed by peer"),
        KeyError("remote"),
    ],
)
def test_a_fault_of_this_rank_is_told_as_its_own(error: BaseException) -> None:
    assert not _is_about_a_peer(error)
