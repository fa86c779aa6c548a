"""Functions that several benchmarks share: interleaved timing, matrix product rate, memory, machine description."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fedfactory import __version__
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def interleaved(variants: dict[str, Callable[[], Any]], *, repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each function. They run in turns, so that other load on the machine affects all of them alike.

    The caller runs each function once beforehand, as a warm-up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class FlopCounter(TorchDispatchMode):
    """Floating point operations of convolutions and matrix products, backward passes included.

    PyTorch's own FlopCounterMode also tracks modules, which fails with `torch.autograd.grad`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def synchronise(device: str) -> None:
    """Wait until the GPU has finished, so that wall time can be read."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str, dtype: torch.dtype = torch.float32, side: int = 1536) -> float:
    """Measured floating point operations per second of a square matrix product, the upper limit in a roofline."""
    if device == "cuda":
        side = 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    seconds = interleaved({"product": lambda: a @ b}, repeats=7, device=device)["product"]
    return 2 * side**3 / seconds


def peak_resident_mib() -> float:
    """Largest resident memory of this process so far. `ru_maxrss` is not used: a child inherits its parent's value."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    return float("nan")


def in_own_process(target: Callable, **arguments: Any) -> Any:
    """Run `target(**arguments, sender=...)` in a new process, so that its peak memory can be measured.

    Returns: the object that `target` sends through `sender`.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, kwargs={**arguments, "sender": sender})
    process.start()
    sender.close()  # otherwise receiving would not end when the child dies
    result = receiver.recv()
    process.join()
    return result


def machine(device: str) -> dict[str, Any]:
    """Description of the machine and the versions of the software, for the JSON files."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": {"fedfactory": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
