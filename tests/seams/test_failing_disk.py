"""A disk that is full, fails, or does half of what it is asked: at every call of every sink that writes files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def failing(c_compiler, tmp_path_factory):
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the sanitizer has to be the first library in the process")
    library = tmp_path_factory.mktemp("failing") / "failing.so"
    subprocess.run([c_compiler, "-shared", "-fPIC", "-O1", HERE / "failing.c", "-o", library, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("sink", ["diff", "replace", "chain", "checkpoint", "trace"])
def test_whatever_call_fails_nothing_is_lost_and_it_can_be_done_again(failing, sink):
    pytest.importorskip("pyarrow")
    command = [sys.executable, HERE / "failing_disk.py", failing, sink]
    env = {**os.environ, "LD_PRELOAD": str(failing), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
