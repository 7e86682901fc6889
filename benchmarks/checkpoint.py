"""What the n-th checkpoint costs beside saving everything: time, bytes, and the time to load, by ratio in one run.

Run: python -m benchmarks.checkpoint [--mib 1024] [--directory DIR] [--sync] [--markdown]. All are equally durable:
without --sync nobody syncs, and with it everybody does. None of the peers syncs by itself (by default
torch.distributed.checkpoint does; it is told not to), so the benchmark calls fsync on their files and their directory,
in the time that is measured; dirtylog does so by itself, as is its default. Peers that are not installed are named and
left out. Without xxhash, dirtylog digests by blake2b, which takes longer than all else at 1 %: its rows say which it
was. Beside the time that passed stands the CPU time of the process, its system calls included, which other work on the
machine moves much less.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import dirtylog as dl
from dirtylog.commands._terminal import bytes_text, seconds_text, show_table


def _npz():
    return (lambda path, array: np.savez(path, w=array)), (lambda path: np.load(path)["w"]), ".npz"


def _joblib():
    import joblib

    return (lambda path, array: joblib.dump({"w": array}, path)), (lambda path: joblib.load(path)["w"]), ".joblib"


def _torch():
    import torch

    def save(path, array):
        torch.save({"w": torch.from_numpy(array)}, path)

    return save, (lambda path: torch.load(path)["w"].numpy()), ".pt"


def _torch_distributed():
    import torch
    from torch.distributed import checkpoint

    # In one process, where it warns that nothing is distributed. By default it syncs; the benchmark does so itself.
    def save(path, array):
        writer = checkpoint.FileSystemWriter(path, sync_files=False)
        checkpoint.save({"w": torch.from_numpy(array)}, storage_writer=writer, no_dist=True)

    def load(path):
        # Into tensors that are there: of each, its shape and type have to be known.
        about = checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata["w"]
        state = {"w": torch.empty(about.size, dtype=about.properties.dtype)}
        checkpoint.load(state, checkpoint_id=path, no_dist=True)
        return state["w"].numpy()

    return save, load, ".distcp"


def _safetensors():
    from safetensors.numpy import load_file, save_file

    return (lambda path, array: save_file({"w": array}, path)), (lambda path: load_file(path)["w"]), ".safetensors"


def _h5py():
    import h5py

    def save(path, array):
        with h5py.File(path, "w") as file:
            file["w"] = array

    def load(path):
        with h5py.File(path) as file:
            return file["w"][:]

    return save, load, ".h5"


def _zarr():
    import zarr

    def save(path, array):
        zarr.open_group(path, mode="w")["w"] = array

    return save, (lambda path: zarr.open_group(path, mode="r")["w"][:]), ".zarr"


PEERS = {
    "np.savez": _npz, "joblib.dump": _joblib, "torch.save": _torch,
    "torch.distributed.checkpoint": _torch_distributed, "safetensors": _safetensors, "h5py": _h5py, "zarr": _zarr,
}  # fmt: skip


def timed(function):
    """Return the seconds that passed, those of CPU, and the answer."""
    start, cpu = time.perf_counter(), time.process_time()
    answer = function()
    return time.perf_counter() - start, time.process_time() - cpu, answer


def size_of(path):
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(each.stat().st_blocks * 512 for each in paths)


def sync(path):
    """Put what a peer wrote on the disk, as a snapshot is when it has its name."""
    for each in [path, *(path.rglob("*") if path.is_dir() else []), path.parent]:
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def compare(array, fraction, directory, peers, rounds, rng, durable):
    """Measure one share of dirty pages: rows of name, save, load, bytes."""
    pages = array.size // 512
    chosen = rng.choice(pages, max(int(pages * fraction), 1), replace=False)
    ours = directory / "ours"
    times = {name: ([], [], []) for name in ["dirtylog", "memcpy of what is dirty", *peers]}
    sizes = {}
    target = np.ones(len(chosen) * 512)

    def note(name, function):
        spent, cpu, answer = timed(function)
        times[name][0].append(spent)
        times[name][1].append(cpu)
        return answer

    with dl.Checkpoint(ours, {"w": array}, sync=durable) as checkpoint:
        checkpoint.save()
        for turn in range(rounds):
            # In turns, so that all meet the same neighbours on the machine.
            array[chosen * 512 + turn] += 1
            info = note("dirtylog", checkpoint.save)
            sizes["dirtylog"] = info.allocated
            view, out = array.reshape(-1, 512), target.reshape(-1, 512)
            runs = info.count
            note("memcpy of what is dirty", lambda v=view, o=out: np.take(v, chosen, 0, out=o))
            sizes["memcpy of what is dirty"] = runs * 4096
            for name, (save, load, ending) in peers.items():
                path = directory / f"peer{ending}"
                remove(path)
                note(name, lambda s=save, p=path: (s(str(p), array), durable and sync(p)))
                sizes[name] = size_of(path)
                if turn == rounds - 1:
                    times[name][2].append(timed(lambda lo=load, p=path: float(np.asarray(lo(str(p))).sum()))[0])
                remove(path)
    times["dirtylog"][2].append(timed(lambda: float(dl.Checkpoint.load(ours)["w"].sum()))[0])
    remove(ours)
    ours = [statistics.median(each) for each in times["dirtylog"][:2]]
    rows = []
    for name, (saves, cpus, loads) in times.items():
        save, cpu = statistics.median(saves), statistics.median(cpus)
        rows.append([
            f"{fraction:.1%}", f"{name}, {info.algorithm}" if name == "dirtylog" else name,
            seconds_text(save), f"{save / ours[0]:.2f} x", seconds_text(cpu),
            f"{cpu / ours[1]:.2f} x", bytes_text(sizes[name]), f"{sizes[name] / (len(chosen) * 4096):.3f}",
            seconds_text(loads[0]) if loads else "-",
        ])  # fmt: skip
    return rows


def show_markdown(header, rows):
    for row in [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *rows]:
        print(f"| {' | '.join(row)} |")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the array (1024)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", help="where to write (the directory for temporary files)")
    parser.add_argument("--dirty", type=float, nargs="+", default=[0.001, 0.01, 0.1, 1.0], metavar="SHARE")
    parser.add_argument("--sync", action="store_true", help="let everybody sync, dirtylog and peers")
    parser.add_argument("--markdown", action="store_true", help="print the table for the documentation")
    options = parser.parse_args()
    if not 1 <= options.mib <= 1 << 16 or not all(0 < share <= 1 for share in options.dirty):
        parser.error("--mib must be from 1 to 65536, and each share above 0 and at most 1")
    peers, missing = {}, []
    for name, make in PEERS.items():
        try:
            peers[name] = make()
        except ImportError:
            missing.append(name)
    rng = np.random.default_rng(0)
    array = dl.empty((options.mib << 17,))
    array[:] = rng.random(1 << 17).repeat(options.mib)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for share in options.dirty:
            rows += compare(array, share, Path(directory), peers, options.rounds, rng, options.sync)
    header = ["dirty", "by", "save", "/ ours", "CPU", "/ ours", "bytes", "per dirty byte", "load and read"]
    synced = "all" if options.sync else "nothing"
    title = f"The n-th checkpoint of {options.mib} MiB, {synced} synced, {os.cpu_count()} CPUs"
    if options.markdown:
        show_markdown(header, rows)
    else:
        show_table(title, header, rows, left=2)
    if missing:
        print(f"not installed: {', '.join(missing)}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
