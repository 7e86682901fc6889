"""``python -m fuzz TARGET``: look for inputs that a parser answers wrongly; ``--replay``: only the kept ones."""

import argparse
import hashlib
import sys
import tempfile
import traceback
from pathlib import Path

from fuzz import NAMES

# What one input may make the process map, beyond what it has once everything is imported.
MEMORY = 256 << 20
SMALL = 4096


def save(directory: Path, data: bytes) -> Path:
    """Keep an input under a name that follows from it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    return path


def with_atheris(options: argparse.Namespace) -> int:
    """Fuzz with libFuzzer, which ends the process itself; a wrong input stays as ``crash-...`` with the findings."""
    import atheris

    with atheris.instrument_imports(include=["dirtylog"], enable_loader_override=False):
        from fuzz.examine import CORPUS, TARGETS, Examiner
    examiner = Examiner(TARGETS[options.target]())
    kept = CORPUS / options.target
    with tempfile.TemporaryDirectory(prefix="dirtylog-fuzz-corpus-") as work:
        for seed in examiner.seeds:
            save(Path(work), seed)
        options.findings.mkdir(parents=True, exist_ok=True)
        arguments = [
            sys.argv[0],
            f"-max_total_time={max(int(options.seconds), 1)}",
            f"-seed={options.seed}",
            "-max_len=32768",
            "-timeout=60",
            f"-artifact_prefix={options.findings}/",
            "-print_final_stats=1",
            work,
            *([str(kept)] if kept.is_dir() else []),
        ]
        atheris.Setup(arguments, lambda data: examiner(data) and None)
        from fuzz.guard import limit_memory

        limit_memory(MEMORY + (64 << 20))
        atheris.Fuzz()
    return 0


def with_own(options: argparse.Namespace) -> int:
    """Fuzz with the engine of `fuzz.engine`, or only examine what is kept."""
    from fuzz.engine import fuzz
    from fuzz.examine import CORPUS, TARGETS, Examiner, corpus_of
    from fuzz.guard import limit_memory

    target = TARGETS[options.target]()
    try:
        examiner = Examiner(target)
        limit_memory(MEMORY)
        inputs = examiner.seeds + corpus_of(options.target)
        if options.replay:
            accepted = 0
            for data in inputs:
                try:
                    accepted += examiner(data)
                except BaseException as error:
                    error.data = data
                    raise
            print(f"{options.target}: {accepted} accepted, {len(inputs) - accepted} refused, none answered wrongly")
            return 0
        seconds = options.seconds if options.runs is None else None
        runs, found = fuzz(examiner, inputs, seconds=seconds, runs=options.runs, seed=options.seed)
        print(f"{options.target}: {runs} inputs, {len(found)} that went new ways, none answered wrongly")
        if options.keep:
            for data in found:
                if len(data) <= SMALL:
                    save(CORPUS / options.target, data)
        return 0
    except BaseException as error:
        data = getattr(error, "data", None)
        if data is None:
            raise
        traceback.print_exc()
        print(f"{options.target}: wrong for the input kept in {save(options.findings, data)}", file=sys.stderr)
        return 1
    finally:
        target.close()


def main() -> int:
    """Run one target; the exit status is 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: %(default)s)")
    parser.add_argument("--runs", type=int, help="end after so many inputs instead (own)")
    parser.add_argument("--seed", type=int, default=1, help="where chance begins (default: %(default)s)")
    parser.add_argument("--engine", choices=("auto", "atheris", "own"), default="auto", help="atheris if installed")
    parser.add_argument("--replay", action="store_true", help="examine the kept inputs and end")
    parser.add_argument("--keep", action="store_true", help="add small inputs that went new ways to fuzz/corpus (own)")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="where wrong inputs are kept")
    options = parser.parse_args()
    engine = options.engine
    if engine == "auto":
        try:
            import atheris  # noqa: F401
        except ImportError:
            engine = "own"
        else:
            engine = "atheris"
    return with_atheris(options) if engine == "atheris" and not options.replay else with_own(options)


if __name__ == "__main__":
    sys.exit(main())
