"""The pictures of the README and of the index, each drawn from a run of this machine: ``python -m docs.pictures``.

    python -m docs.pictures                     # all of them, about half a minute
    python -m docs.pictures heat-map            # one

Needs the extras cli, plot, trace and bench, tmux for top, and chromium for the report. The pictures are checked in, for
a reader has no time to make them. Each is a dark card of its own, so that it reads the same on a light page and on a
dark one.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import dirtylog as dl

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

STATIC = Path(__file__).resolve().parent / "_static"
CARD, INK, FAINT = "#0f172a", "#e2e8f0", "#94a3b8"
OURS, OTHERS = "#f97316", "#64748b"
HEAT = LinearSegmentedColormap.from_list("heat", ["#16213b", "#6d28d9", "#f97316", "#fde68a"])
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dirtylog",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Segoe UI", "DejaVu Sans", "sans-serif"],
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": CARD,
    "axes.titlelocation": "left",
    "axes.titlesize": 12.5,
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.22,
    "figure.constrained_layout.h_pad": 0.2,
}


def save(figure: Figure, name: str, title: str) -> None:
    """Write a figure on its card; `title` is what a screen reader says."""
    card = FancyBboxPatch(
        (0.012, 0.02), 0.976, 0.96, boxstyle="round,pad=0.01", transform=figure.transFigure, facecolor=CARD, zorder=-1
    )
    card.set_edgecolor("none")
    figure.patches.append(card)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Title": title})
    plt.close(figure)
    write(name, text.getvalue())


def write(name: str, svg: str) -> None:
    """Write a picture, without what only a program reads."""
    svg = re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)
    path = STATIC / name
    path.write_text(svg)
    print(f"{path.relative_to(STATIC.parents[1])}: {len(svg) // 1024 + 1} KiB")


# ---- what a sort writes ---------------------------------------------------------------------------

SORT_BYTES = 64 << 20


def record_a_sort(path: Path) -> int:
    """Record which pages one `array.sort()` writes, harvest after harvest; return how many harvests there were."""
    from dirtylog.sinks.trace import record

    array = dl.empty(SORT_BYTES // 16, dtype=np.complex128)
    array.real = np.random.default_rng(4).permutation(array.size)
    array.imag = 0
    stop = threading.Event()

    def sort() -> None:
        array.sort()
        stop.set()

    sorter = threading.Thread(target=sort)

    def wait(seconds: float) -> None:
        if sorter.ident is None:
            sorter.start()  # not before the recorder is ready
        stop.wait(seconds)

    with dl.track(array) as tracker:
        epochs = record(path, tracker, interval=0.004, stop=stop, wait=wait)
        sorter.join()
    assert (np.diff(array.real) > 0).all()
    return epochs


def heat_map() -> None:
    """One sort of 64 MiB, drawn by `dirtylog.sinks.plot.heat_map` from a trace."""
    from dirtylog.sinks import plot
    from dirtylog.sinks.trace import Trace

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "sort.parquet"
        epochs = record_a_sort(path)
        figure, ax = plt.subplots(figsize=(8.4, 3.6), dpi=110)
        with Trace(path) as trace:
            plot.heat_map(trace, ax, rows=200, cmap=HEAT)
    ax.set_title(f"One array.sort() of {SORT_BYTES >> 20} MiB, seen in {epochs} harvests")
    figure.axes[1].set_ylabel("share of pages written")
    save(
        figure,
        "heat-map.svg",
        "Heat map of the pages that a sort writes: a wedge that closes, then smaller and smaller ones",
    )


# ---- what a terminal shows --------------------------------------------------------------------------

TERMINAL = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>{title}</title>
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
{styles}
</style>
<defs>{lines}</defs>
<rect width="{width}" height="{height}" rx="12" fill="#0f172a"/>
<g transform="translate(26,22)">
<circle r="6" fill="#ff5f57"/><circle cx="20" r="6" fill="#febc2e"/><circle cx="40" r="6" fill="#28c840"/>
</g>
<g transform="translate({terminal_x}, {terminal_y})">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


COLUMNS = 84


def printed(*command: str) -> str:
    """Run a command in a terminal of its own and return what it prints there, colours included."""
    ours, its = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "PYTHONUTF8": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", *command], env=environment, stdout=its, stderr=subprocess.DEVNULL
    ) as run:
        os.close(its)
        said = b""
        while chunk := read(ours):
            said += chunk
    os.close(ours)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {run.returncode}")
    return said.decode()


def read(descriptor: int) -> bytes:
    """Read from a terminal; nothing when nobody has its other end open."""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # EIO
        return b""


def terminal(name: str, title: str, command: str, lines: list[str], columns: int = COLUMNS) -> None:
    """Draw a terminal in which a command was given, with the lines that it shows, colours included."""
    from rich.ansi import AnsiDecoder
    from rich.console import Console
    from rich.terminal_theme import TerminalTheme
    from rich.text import Text

    theme = TerminalTheme(
        (15, 23, 42),
        (226, 232, 240),
        # black, red, green, yellow, blue, magenta, cyan, white
        [
            (15, 23, 42),
            (248, 113, 113),
            (74, 222, 128),
            (250, 204, 21),
            (96, 165, 250),
            (192, 132, 252),
            (34, 211, 238),
            (226, 232, 240),
        ],
    )
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    for text in AnsiDecoder().decode("\n".join(lines)):  # a style goes on in the next line until it is changed
        console.print(text, no_wrap=True, crop=True)
    template = TERMINAL.replace("{title}", title)
    write(name, console.export_svg(theme=theme, code_format=template, unique_id="t"))


def info() -> None:
    """What `dirtylog info` says of this machine."""
    title = "The output of dirtylog info: which facilities this machine offers"
    terminal("info.svg", title, "dirtylog info", printed("dirtylog", "info").splitlines())


def top() -> None:
    """A training program under `dirtylog top`, in tmux: all its regions, and one of its arrays from near."""
    columns, lines = 112, 20
    with tempfile.TemporaryDirectory() as directory:
        socket_path, program = f"{directory}/agent", Path(directory) / "training.py"
        program.write_text(TRAINING.replace("range(4)", "range(1000)"))
        command = [sys.executable, "-m", "dirtylog.agent", "--socket", socket_path, str(program)]
        with subprocess.Popen(command) as training:
            tmux = ["tmux", "-L", f"dirtylog-pictures-{os.getpid()}"]

            def ask(*words: str) -> str:
                return subprocess.run([*tmux, *words], check=True, stdout=subprocess.PIPE, text=True).stdout

            def shown(*texts: str) -> list[str]:
                """Wait for a picture that has these words in it, and some looks more; return it."""
                deadline = time.monotonic() + 60
                while not all(text in ask("capture-pane", "-p") for text in texts):
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"top did not show {texts}: {ask('capture-pane', '-p')}")
                    time.sleep(0.1)
                time.sleep(4)
                return ask("capture-pane", "-p", "-e").rstrip().splitlines()

            try:
                while not os.path.exists(socket_path):
                    time.sleep(0.05)
                watch = [sys.executable, "-m", "dirtylog", "top", str(training.pid), "--agent", socket_path]
                size = ["-x", str(columns), "-y", str(lines)]
                ask("new-session", "-d", *size, "env", "-u", "COLUMNS", *watch, "--interval", "0.5")
                said = "dirtylog top training --agent training.sock"
                regions = shown("weights", "moment")
                regions = [line.replace(f"{training.pid}:", "training:") for line in regions]
                title = "dirtylog top: regions of a program by what they write per second, each with a strip of where"
                terminal("top.svg", title, said, regions, columns)
                ask("send-keys", "Down")
                ask("send-keys", "Enter")
                near = shown("a character is")
                title = "dirtylog top, one region from near: where in it is written now, and where lately"
                terminal("top-near.svg", title, said, near, columns)
            finally:
                subprocess.run([*tmux, "kill-server"], check=False)
                training.kill()


# ---- one chart ------------------------------------------------------------------------------------------

GUEST_PAGES = 1 << 24
DENSITY = 1e-4
LEFT = 0.3  # where the bars begin, on a logarithmic axis that has no zero


def harvest() -> None:
    """Mark some pages of a 64 GiB guest and harvest their numbers: dirtylog beside its peers, in one run."""
    from benchmarks.peers.claims import random_pages
    from benchmarks.peers.contestants import Bitarray, Dirtylog, Numpy, Roaring
    from benchmarks.peers.timing import side_by_side

    pages = random_pages(GUEST_PAGES, DENSITY)

    def job(kind: Callable[[int], Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        contestant = kind(GUEST_PAGES)
        contestant.prepare(pages)
        return contestant.clear, lambda: (contestant.mark(), contestant.numbers())

    times = side_by_side({kind.name: job(kind) for kind in (Dirtylog, Roaring, Bitarray, Numpy)}, seconds=4, rounds=41)
    ours = times[Dirtylog.name]
    names = sorted(times, key=times.__getitem__, reverse=True)
    ratios = [times[name] / ours for name in names]
    figure, ax = plt.subplots(figsize=(8.4, 2.7))
    ax.barh(names, ratios, height=0.62, left=LEFT, color=[OURS if name == Dirtylog.name else OTHERS for name in names])
    ax.set_xscale("log")
    ax.set_xlim(LEFT, max(ratios) * 5)
    for row, (name, ratio) in enumerate(zip(names, ratios, strict=True)):
        said = (
            f"{ours * 1e6:,.0f} µs"
            if name == Dirtylog.name
            else f"{ratio:,.0f} times as long"
            if ratio >= 10
            else f"{ratio:.1f} times as long"
        )
        ax.text((ratio + LEFT) * 1.1, row, said, va="center")
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.xaxis.set_visible(False)
    ax.spines[["bottom", "left"]].set_visible(False)
    ax.set_title(f"Mark {len(pages):,} pages of a 64 GiB guest and harvest their numbers (log scale)")
    save(figure, "harvest.svg", "Bar chart of the time to mark and harvest, as a multiple of dirtylog's")


# ---- what writers pay, who saves, and another process -----------------------------------------------------


def price_of_writers() -> None:
    """Fill 32 MiB after a harvest, by each back end, as a multiple of the same store untracked in the same round."""
    array = dl.empty(32 << 20, np.uint8)
    array[:] = 1

    def seconds(value: int) -> float:
        before = time.perf_counter()
        array[:] = value
        return time.perf_counter() - before

    ratios: dict[str, list[float]] = {"compare": [], "userfaultfd": [], "mprotect": []}
    for _ in range(7):
        for backend, found in ratios.items():
            untracked = min(seconds(value) for value in (1, 2, 3))
            with dl.track(array, backend) as tracker:
                tracker.harvest()
                found.append(seconds(4) / untracked)
    figure, ax = plt.subplots(figsize=(8.4, 2.4))
    for row, found in enumerate(ratios.values()):
        ax.plot(found, [row] * len(found), "o", color=OTHERS, ms=6)
        ax.plot(np.median(found), row, "|", color=OURS, ms=26, mew=4)
        ax.text(max(found) * 1.12, row, f"median {np.median(found):.1f}", va="center")
    ax.axvline(1, color=FAINT, lw=1)
    ax.set_yticks(range(len(ratios)), list(ratios))
    ax.set_ylim(-0.6, len(ratios) - 0.4)
    ax.set_xscale("log")
    ax.set_xlim(0.8, max(map(max, ratios.values())) * 2.2)
    ax.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    ax.minorticks_off()
    ax.set_title("Time to fill whole pages after a harvest, over the same store untracked")
    save(figure, "price-of-writers.svg", "What a dense writer pays, by back end, seven rounds each")


def child_saves() -> None:
    """Save 100 MiB in turn by the program itself and by a forked child; measure how long the program stands still."""
    array = dl.empty(100 << 20, np.uint8)
    stalls: dict[str, list[float]] = {"saves itself": [], "lets a child save": []}

    def write_pages(path: Path, runs: Any) -> None:
        with path.open("wb") as file:
            for first, count in runs:
                file.write(memoryview(array)[first * 4096 : (first + count) * 4096])
            file.flush()
            os.fsync(file.fileno())

    with tempfile.TemporaryDirectory() as directory, dl.track(array) as tracker:
        path = Path(directory) / "saved"
        for value in range(5):
            for way, found in stalls.items():
                array[:] = value
                before = time.perf_counter()
                runs = tracker.harvest().runs()
                if way == "saves itself":
                    write_pages(path, runs)
                    found.append(time.perf_counter() - before)
                    continue
                child = os.fork()
                if child == 0:
                    try:
                        write_pages(path, runs)
                        os._exit(0)
                    finally:
                        os._exit(1)
                found.append(time.perf_counter() - before)
                if os.waitpid(child, 0)[1]:
                    raise RuntimeError("the child could not save")
    figure, ax = plt.subplots(figsize=(8.4, 2.2))
    for row, found in enumerate(stalls.values()):
        ax.barh(row, np.median(found) * 1e3, height=0.5, color=OURS if row else OTHERS)
        ax.plot(np.array(found) * 1e3, [row] * len(found), "o", color=INK, ms=4)
        ax.text(max(found) * 1e3 + 15, row, f"{np.median(found) * 1e3:,.0f} ms", va="center")
    ax.set_yticks(range(2), list(stalls))
    ax.set_xlim(0, max(map(max, stalls.values())) * 1.2e3)
    ax.set_xlabel("milliseconds that the program stands still")
    ax.set_title("100 MiB, all dirty: five rounds each, in turn (bar: median)")
    save(figure, "child-saves.svg", "How long a program stands still: it saves itself, or lets a child save")


def qemu() -> None:
    """Start a QEMU guest without a disk, its memory in a shared file, and harvest while its firmware starts."""
    pages, harvests = 8192, 40
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:  # a file whose pages are memory
        ram, qmp = Path(directory) / "guest.ram", Path(directory) / "qmp"
        backend = f"memory-backend-file,id=ram,size={pages * 4096},mem-path={ram},share=on"
        command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "32M", "-display", "none", "-nodefaults", "-S"]
        command += ["-machine", "pc,memory-backend=ram", "-object", backend]
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(qmp))
            server.listen()
            guest = subprocess.Popen([*command, "-qmp", f"unix:{qmp}"])
            monitor, _ = server.accept()
            with guest, monitor, monitor.makefile("rw") as lines:

                def order(name: str) -> None:
                    lines.write(json.dumps({"execute": name}) + "\n")
                    lines.flush()
                    while "return" not in json.loads(lines.readline()):
                        pass

                lines.readline()
                order("qmp_capabilities")
                memory = np.memmap(ram, dtype="u1", mode="r+")
                seen = np.zeros((harvests, pages), bool)
                with dl.track(memory) as tracker:
                    name = tracker.backend
                    for column in range(harvests):
                        order("cont")
                        time.sleep(0.1)
                        order("stop")
                        seen[column, tracker.harvest().indices()] = True
                order("quit")
    rows = seen.reshape(harvests, 128, -1).mean(axis=2).T
    figure, ax = plt.subplots(figsize=(8.4, 3.4))
    ax.imshow(
        np.ma.masked_equal(rows, 0) ** 0.3,
        aspect="auto",
        origin="lower",
        cmap=HEAT,
        extent=(0, harvests / 10, 0, 32),
        interpolation="nearest",
        vmin=0,
        vmax=1,
    )
    ax.set_xlabel("seconds of the guest's time")
    ax.set_ylabel("guest memory, MiB")
    ax.set_title(f"A QEMU guest starts: {seen.any(axis=0).sum():,} of {pages:,} pages written, seen by {name}")
    save(figure, "qemu.svg", "Pages that the firmware of a QEMU guest writes while it starts, over time")


# ---- the page of a trace ------------------------------------------------------------------------------------

TRAINING = """\
import time
import numpy as np

random = np.random.default_rng(1)
data = random.random(4 << 20)  # 32 MiB
weights, moment = np.zeros(8 << 20, "f4"), np.zeros(8 << 20, "f4")
for epoch in range(4):
    for step in range(16):
        part = slice(step << 19, (step + 1) << 19)
        moment[random.integers(0, moment.size, 500)] += 1
        weights[part] -= 0.1 * moment[part]
        time.sleep(0.08)
    checkpoint = weights.copy()
    time.sleep(0.4)
"""


def report() -> None:
    """Record a program, with the names of its arrays, and photograph the page of the trace."""
    from dirtylog.sinks.trace import Trace

    with tempfile.TemporaryDirectory() as directory:

        def run(*command: str) -> None:
            subprocess.run(command, cwd=directory, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        (Path(directory) / "training.py").write_text(TRAINING)
        dirtylog = [sys.executable, "-m", "dirtylog"]
        run(*dirtylog, "record", "--arrays", "--interval", "0.1", "training.trace", "training.py")
        with Trace(Path(directory) / "training.trace") as trace:
            if not any(name.startswith("weights") for name in trace.regions):
                raise RuntimeError("the program was too busy to say what its arrays are called: try again")
        run(*dirtylog, "report", "training.trace")
        browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if browser is None:
            raise RuntimeError("a picture of the report needs a browser: install chromium")
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        profile = f"--user-data-dir={directory}/profile"
        # All charts have been drawn when so much of the page's own time is over.
        size = ["--window-size=1100,1640", "--hide-scrollbars", "--virtual-time-budget=20000"]
        picture = STATIC / "report.png"
        page = (Path(directory) / "training.html").as_uri()
        run(browser, *root, "--headless", "--disable-gpu", profile, *size, f"--screenshot={picture}", page)
    print(f"{picture.relative_to(STATIC.parents[1])}: {picture.stat().st_size // 1024 + 1} KiB")


PICTURES: dict[str, Callable[[], None]] = {
    "heat-map": heat_map,
    "info": info,
    "top": top,
    "harvest": harvest,
    "price-of-writers": price_of_writers,
    "child-saves": child_saves,
    "qemu": qemu,
    "report": report,
}


def main() -> None:
    """Draw the pictures that are named, or all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *PICTURES], help="which pictures (default: all)")
    STATIC.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        for name in parser.parse_args().names or PICTURES:
            PICTURES[name]()


if __name__ == "__main__":
    main()
