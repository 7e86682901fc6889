"""``python -m formal``: check every model, print the table, fail if a verdict is not the one demanded."""

import argparse
import fnmatch
import json
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from formal import spin
from formal.catalog import CHECKS, Check

COLUMNS = "{:<15} {:<39} {:<30} {:<9} {:>10} {:>7}"


def selected(patterns: Iterable[str]) -> list[Check]:
    """Return the checks that one of the shell patterns matches, as a whole name or as its beginning; all for none."""
    patterns = list(patterns)
    return [
        check
        for check in CHECKS
        if not patterns
        or any(fnmatch.fnmatch(check.name, pattern + suffix) for pattern in patterns for suffix in ("", "/*"))
    ]


def attempt(check: Check) -> spin.Result | spin.SpinError:
    """Run one check; a run without a verdict is a result, too, and fails the whole."""
    try:
        return spin.run(check)
    except spin.SpinError as error:
        return error


def row(check: Check, result: spin.Result | spin.SpinError) -> str:
    """Return the table's line for one check."""
    if isinstance(result, spin.SpinError):
        return COLUMNS.format(check.model, check.claim, check.variant, "NONE", "", "")
    verdict = result.verdict if result.as_expected else result.verdict.upper() + "!"
    return COLUMNS.format(
        check.model, check.claim, check.variant, verdict, f"{result.states:,}", f"{result.seconds:.1f} s"
    )


def record(check: Check, result: spin.Result | spin.SpinError) -> dict[str, object]:
    """Return one check and its result as JSON can hold them."""
    told = {"name": check.name, "model": check.model, "property": check.claim, "variant": check.variant}
    told["expected"] = check.expect
    if isinstance(result, spin.SpinError):
        return {**told, "verdict": None, "error": str(result), "as_expected": False}
    return {
        **told,
        "verdict": result.verdict,
        "as_expected": result.as_expected,
        "states": result.states,
        "seconds": round(result.seconds, 2),
        "trail": result.trail,
        "unreached": result.unreached,
    }


def explain(result: spin.Result | spin.SpinError, *, trail: bool) -> Iterable[str]:
    """Say what was wrong with a result, or tell the trail if it is asked for."""
    if isinstance(result, spin.SpinError):
        yield str(result)
        return
    for line in result.unreached if result.check.expect == "holds" else ():
        yield f"    never reached: {line}"
    for number, line in enumerate(result.trail if trail or not result.as_expected else (), 1):
        yield f"    {number:>3}. {line}"


def main(arguments: list[str] | None = None) -> int:
    """Run the checks that were asked for; 0 if every verdict is the one demanded, 1 if not, 2 if Spin is absent."""
    parser = argparse.ArgumentParser(prog="python -m formal", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="model/variant/property, or a pattern"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON, trails included")
    parser.add_argument("--trail", action="store_true", help="tell the shortest counterexample of each refuted variant")
    parser.add_argument("--list", action="store_true", help="print the names that --only takes, and run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="checks at once (default: one for each CPU)")
    options = parser.parse_args(arguments)
    checks = selected(options.only)
    if not checks:
        parser.error(f"--only {' '.join(options.only)} names no check; --list prints those there are")
    if options.list:
        print(*(check.name for check in checks), sep="\n")
        return 0
    if absent := spin.missing():
        print(f"not installed: {', '.join(absent)} (Debian packages: spin, gcc)", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    records: list[dict[str, object]] = []
    if not options.json:
        print(COLUMNS.format("model", "property", "variant", "verdict", "states", "time"))
    with ThreadPoolExecutor(options.jobs) as pool:
        for check, result in zip(checks, pool.map(attempt, checks), strict=True):
            records.append(record(check, result))
            if not options.json:
                print(row(check, result), *explain(result, trail=options.trail), sep="\n", flush=True)
    failed = [told for told in records if not told["as_expected"]]
    if options.json:
        print(json.dumps(records, indent=1))
    else:
        held = sum(told["verdict"] == "holds" for told in records)
        refuted = sum(told["verdict"] == "refuted" for told in records)
        seconds = time.perf_counter() - begin
        print(f"{held} hold, {refuted} refuted, {len(failed)} not as demanded; {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
