"""Measures operations beside their peers on one GPU, once every sample agrees with the reference.

    python -m pegbox_kernels.harness.bench logprob            # about two minutes; writes the CSV
    python -m pegbox_kernels.harness.bench all
    python -m pegbox_kernels.harness.bench logprob --sweep    # launch settings around the default

Times are medians (with the 20th and 80th percentile) of `triton.testing.do_bench`, which clears the cache between
runs. Launching an operation of less than `SHORT_MS` may take the host longer than computing it takes the GPU; its time
as a captured graph, which leaves the host out, then stands beside. GB/s and TFLOP/s count the bytes and operations that
the workload needs at least, whoever spends more. The limit is the longer of two times: those bytes at the speed of a
large device-to-device copy, those operations at the speed of a large bf16 matrix product, both measured in the same
run. Peak bytes are above what was allocated before the call, the gradient included. Peers that are not installed are
missing from the table; when `--limit-s` has passed, no further peer is started, and it is listed as skipped.
"""

from __future__ import annotations

import argparse
import csv
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from pegbox_kernels.harness.opspec import Cost, OpSpec, Outputs, Workload
from pegbox_kernels.harness.parity import compare
from pegbox_kernels.harness.registry import specs

PACKAGE = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda")
COPY_BYTES = 2**31
PRODUCT_SIZE = 8192
SHORT_MS = 2.0
ALL, OURS, IN_PLACE = "all", "pegbox", "in place"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and with what the figures were taken."""

    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str

    @classmethod
    def here(cls) -> Machine:
        import triton

        return cls(
            gpu=torch.cuda.get_device_name(),
            driver=_first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            torch=torch.__version__,
            triton=triton.__version__,
            commit=_first_line("git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=12"),
            date=datetime.now(UTC).date().isoformat(),
        )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this GPU can do at most, as measured by plain PyTorch."""

    copy_gb_per_s: float
    product_tflop_per_s: float

    def least_ms(self, cost: Cost) -> float:
        """The longer of moving the bytes and of computing the operations."""
        return max(cost.bytes_moved / self.copy_gb_per_s / 1e6, cost.flops / self.product_tflop_per_s / 1e9)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One contender on one pass of one workload; figures are None if `status` is not `ok`."""

    op: str
    workload: str
    what: str
    contender: str
    status: str = "ok"
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    peak_bytes: int | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    limit_ms: float | None = None
    percent_of_limit: float | None = None
    graph_ms: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured. 1: an operation disagrees with its reference. 2: nothing can be measured here."""
    parser = argparse.ArgumentParser(prog="python -m pegbox_kernels.harness.bench", description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="+", choices=[*sorted(specs()), ALL])
    parser.add_argument("--sweep", action="store_true", help="time launch settings instead, and write nothing")
    parser.add_argument("--results", type=Path, help="folder of the CSV (benchmarks/results/<gpu> of the checkout)")
    parser.add_argument("--only", default="", help="measure workloads whose name contains this")
    parser.add_argument("--peers", nargs="*", metavar="WORD", help="only peers whose name begins with one of these")
    parser.add_argument("--limit-s", type=float, default=130.0, help="seconds per operation for starting peers")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("No CUDA device: nothing can be measured here. Parity on the CPU: pytest kernels", file=sys.stderr)
        return 2
    machine = Machine.here()
    print(*(f"{name} {value}" for name, value in asdict(machine).items()), sep=" · ")
    limits = Limits(copy_gb_per_s=copy_bandwidth(), product_tflop_per_s=product_speed())
    print(
        f"copy of {COPY_BYTES >> 30} GiB: {limits.copy_gb_per_s:.0f} GB/s, bytes read plus bytes written; "
        f"bf16 product of {PRODUCT_SIZE}^3: {limits.product_tflop_per_s:.0f} TFLOP/s"
    )
    names = sorted(specs()) if ALL in options.op else options.op
    return max(_bench(specs()[name], machine, limits, options) for name in names)


def _bench(spec: OpSpec, machine: Machine, limits: Limits, options: argparse.Namespace) -> int:
    started = time.monotonic()
    workloads = [workload for workload in spec.workloads if options.only in workload.name]
    if not agrees(spec, sorted({workload.dtype for workload in workloads}, key=str), DEVICE):
        print(f"{spec.name} is wrong here: no speed is measured.", file=sys.stderr)
        return 1
    if options.sweep:
        sweep(spec, workloads[:2], limits)
        return 0

    def takes_part(name: str) -> bool:
        return options.peers is None or name.startswith((OURS, *options.peers))

    def left() -> bool:
        return time.monotonic() - started < options.limit_s

    measured = []
    for workload in workloads:
        print(f"\n{spec.name}: {workload.name}")
        for measurement in measure(spec, workload, limits, takes_part, left):
            measured.append(measurement)
            print(_row(measurement), flush=True)
    folder = options.results or PACKAGE / "benchmarks" / "results" / machine.gpu.lower().replace(" ", "-")
    print(f"\nwritten: {write(folder / f'{spec.name}.csv', measured, machine, limits)}")
    return 0


def agrees(spec: OpSpec, dtypes: Sequence[torch.dtype], device: torch.device) -> bool:
    """Whether every sample agrees with the reference in these dtypes; prints the first that does not."""
    compared = 0
    for dtype in dtypes:
        for sample in spec.samples:
            if reason := sample.unfit(dtype, device):
                print(f"not compared: {sample.name}, {dtype}: {reason}")
                continue
            for agreement in compare(spec, sample, dtype, device):
                compared += 1
                if not agreement.holds:
                    print(f"{sample.name}, {dtype}: {agreement}")
                    return False
    print(f"parity: {compared} tensors of {len(spec.samples)} samples agree with the fp64 reference")
    return True


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    from triton.testing import do_bench

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


def product_speed() -> float:
    """TFLOP/s of one large bf16 matrix product."""
    from triton.testing import do_bench

    one = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=torch.bfloat16, device=DEVICE)
    return 2 * PRODUCT_SIZE**3 / do_bench(lambda: one @ one, return_mode="median") / 1e9


def measure(
    spec: OpSpec, workload: Workload, limits: Limits, takes_part: Callable[[str], bool], left: Callable[[], bool]
) -> Iterator[Measurement]:
    """Each contender, forward and forward with backward, on inputs made for it (some overwrite them)."""
    names = list(filter(takes_part, spec.contenders(workload.make(workload.dtype, DEVICE))))
    passes = {
        "forward": (_forward, workload.forward),
        "forward + backward": (_forward_backward, _sum(workload.forward, workload.backward)),
    }
    for what, (body, cost) in passes.items():
        for name in names:
            if what == "forward" and name.endswith(IN_PLACE):
                continue  # It differs in the backward alone.
            row = Measurement(op=spec.name, workload=workload.name, what=what, contender=name)
            _clear()
            if not name.startswith(OURS) and not left():
                yield replace(row, status="skipped: time is up")
                continue
            inputs = workload.make(workload.dtype, DEVICE)
            leaves = spec.leaves(inputs, workload.frozen)
            inputs.update(leaves)
            try:
                yield _timed(row, body(tuple(leaves.values()), spec.contenders(inputs)[name]), cost, limits)
            except torch.OutOfMemoryError:
                yield replace(row, status="out of memory")
            except Exception as problem:
                # A peer that breaks on this machine must not cost the figures of the others.
                if name.startswith(OURS):
                    raise
                yield replace(row, status=f"failed: {type(problem).__name__}")
            del inputs, leaves


def sweep(spec: OpSpec, workloads: Sequence[Workload], limits: Limits) -> None:
    """Print the median of every variant, by pass (the first word of its name), fastest first."""
    from triton.testing import do_bench

    for workload in workloads:
        _clear()
        variants = spec.variants(workload.make(workload.dtype, DEVICE))
        timed = {name: do_bench(call, warmup=10, rep=50, return_mode="median") for name, call in variants.items()}
        print(
            f"\n{spec.name}: {workload.name}: limits {limits.least_ms(workload.forward):.3f} and "
            f"{limits.least_ms(workload.backward):.3f} ms"
        )
        for name, median_ms in sorted(timed.items(), key=lambda item: (item[0].split()[0], item[1])):
            print(f"  {name:32} {median_ms:8.3f} ms")


def write(path: Path, measured: Sequence[Measurement], machine: Machine, limits: Limits) -> Path:
    """One line per measurement, each with the machine, so that tables can be joined."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = [field.name for kind in (Measurement, Limits, Machine) for field in fields(kind)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for measurement in measured:
            cells = (*astuple(measurement), *astuple(limits), *astuple(machine))
            writer.writerow([f"{cell:.5g}" if isinstance(cell, float) else cell for cell in cells])
    return path


def _forward(leaves: tuple[Tensor, ...], contender: Callable[[], Outputs]) -> Callable[[], object]:
    return torch.no_grad()(contender)


def _forward_backward(leaves: tuple[Tensor, ...], contender: Callable[[], Outputs]) -> Callable[[], object]:
    weights = [torch.randn_like(out) for out in contender() if out is not None and out.requires_grad]

    def call() -> object:
        outputs = [out for out in contender() if out is not None and out.requires_grad]
        return torch.autograd.grad(outputs, leaves, weights)

    return call


def _timed(row: Measurement, call: Callable[[], object], cost: Cost, limits: Limits) -> Measurement:
    from triton.testing import do_bench

    call()
    _synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak_bytes = torch.cuda.max_memory_allocated() - before
    median_ms, p20_ms, p80_ms = do_bench(call, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8])
    limit_ms = limits.least_ms(cost)
    graph_ms = captured(call) if median_ms < SHORT_MS else None
    return replace(
        row,
        median_ms=median_ms,
        p20_ms=p20_ms,
        p80_ms=p80_ms,
        peak_bytes=peak_bytes,
        gb_per_s=cost.bytes_moved / median_ms / 1e6,
        tflop_per_s=cost.flops / median_ms / 1e9,
        limit_ms=limit_ms,
        percent_of_limit=100 * limit_ms / median_ms,
        graph_ms=graph_ms,
    )


def captured(call: Callable[[], object]) -> float | None:
    """Median milliseconds of replaying the call as a CUDA graph; None if it cannot be captured."""
    from triton.testing import do_bench

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                call()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return do_bench(graph.replay, warmup=25, rep=100, return_mode="median")  # type: ignore[no-any-return]


def _row(m: Measurement) -> str:
    head = f"  {m.what:19} {m.contender:20}"
    if m.median_ms is None or m.peak_bytes is None:
        return f"{head} {m.status}"
    return (
        f"{head} {m.median_ms:8.3f} ms ({m.p20_ms:.3f} to {m.p80_ms:.3f})"
        f"{f', {m.graph_ms:.3f} as a graph' if m.graph_ms else '':22} {m.peak_bytes / 2**20:9.1f} MiB"
        f" {m.gb_per_s:6.0f} GB/s {m.tflop_per_s:6.1f} TFLOP/s {m.percent_of_limit:5.1f} % of the limit"
    )


def _sum(one: Cost, other: Cost) -> Cost:
    return Cost(bytes_moved=one.bytes_moved + other.bytes_moved, flops=one.flops + other.flops)


def _clear() -> None:
    """Free what earlier contenders left; forget what was compiled: dynamo gives up after a few shapes."""
    torch.compiler.reset()
    _synchronize()


def _synchronize() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()


def _first_line(*command: str) -> str:
    """The first line that a program prints, or `unknown`: figures without it are still figures."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


if __name__ == "__main__":
    sys.exit(main())
