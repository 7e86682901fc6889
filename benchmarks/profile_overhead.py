"""What `dirtylog profile` costs a program that computes and dirties 100 MB a second: with it, and without.

The program does a fixed amount of work: after so much arithmetic it writes the
next MiB of a large array, about 95 times a second where nobody watches. The best
of some runs of each kind are compared, by wall time, which wants an idle machine,
and by CPU time of all threads, which is steadier.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
import sys, time
import numpy as np
passes, work = int(sys.argv[1]), int(sys.argv[2])
array = np.ones(256 << 20, np.uint8)
x = np.linspace(0.0, 1.0, 4096)
began = time.perf_counter(), time.process_time()
for i in range(passes):
    for _ in range(work):
        np.sqrt(x, out=x)
    start = (i << 20) % array.size
    array[start : start + (1 << 20)] += 1
print(time.perf_counter() - began[0], time.process_time() - began[1])
"""


def seconds_of(script: Path, passes: int, work: int, *launcher: str) -> tuple[float, float]:
    """Wall time and CPU time."""
    command = [sys.executable, *launcher, str(script), str(passes), str(work)]
    wall, cpu = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return float(wall), float(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100e6, help="bytes a second (1e8)")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--interval", default="1")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    passes = max(1, int(args.seconds * args.rate / 2**20))
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "program.py")
        script.write_text(PROGRAM, encoding="utf-8")
        work = 100
        for _ in range(3):
            # Towards the work that takes the time wanted: the writes are a small part of it.
            work = max(1, round(work * args.seconds / seconds_of(script, passes, work)[1]))
        profile = ("-m", "dirtylog", "profile", "--output", "/dev/null", "--interval", args.interval)
        # In turns, so that both see the same machine.
        runs = [
            (*seconds_of(script, passes, work), *seconds_of(script, passes, work, *profile)) for _ in range(args.runs)
        ]
    wall, cpu, wall_profiled, cpu_profiled = (min(column) for column in zip(*runs, strict=True))
    print(f"{passes * 2**20 / wall / 1e6:.0f} MB/s written, sampled every {args.interval} s")
    print(f"wall time {wall:.3f} s alone, {wall_profiled:.3f} s profiled: {wall_profiled / wall - 1:+.1%}")
    print(f"CPU time  {cpu:.3f} s alone, {cpu_profiled:.3f} s profiled: {cpu_profiled / cpu - 1:+.1%}")


if __name__ == "__main__":
    main()
