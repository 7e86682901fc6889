"""Start Python processes that have numpy and dirtylog imported already: forks of one that has done nothing but import.

A test whose process may crash, hang, or own its signal handlers needs one of its own, and there are hundreds of them.
Imports cost each a third of a second, a fork a few milliseconds. What a test is about must not have happened yet in a
process that only imported; where that is in doubt (an environment variable read at import), start an interpreter. So
does a test of the interpreter's own end: a process that ends in order here waits for its threads, runs what was
registered for its end, drops what the program holds and flushes, but does not take the imported modules apart, which
would cost as much as to import them.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

# What most of these processes import, or the test module that they load.
MODULES = (
    "argparse ctypes json mmap threading warnings numpy hypothesis pytest "
    "dirtylog.sinks.checkpoint dirtylog.sinks.profile dirtylog.sinks.snapshot dirtylog.sources.kvm "
    "dirtylog.sources.memory dirtylog.sources.process.launch "
    "dirtylog.commands.profile dirtylog.commands.record"
)
LARGEST_REQUEST = 1 << 17
# As it is at first: a test may start programs without the sanitizer that watches its own process.
PRELOAD = os.environ.get("LD_PRELOAD", "")


class Child:
    """A process that runs `code`, with what `subprocess.Popen` offers of one that is used here."""

    def __init__(self, code, arguments, descriptors, cwd, environment):
        self._reply, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps([code, list(map(str, arguments)), str(cwd or os.getcwd()), environment]).encode()
        assert len(request) <= LARGEST_REQUEST
        with theirs:
            socket.send_fds(_server(), [request], [*descriptors, theirs.fileno()])
        self.returncode = None
        self.pid = int(self._reply.recv(64))

    def wait(self, timeout=None):
        """Return the exit code, or minus the number of the signal that ended it."""
        if self.returncode is None:
            self._reply.settimeout(timeout)
            try:
                status = int(self._reply.recv(64))
            except TimeoutError:
                raise subprocess.TimeoutExpired("python", timeout) from None
            self.returncode = os.waitstatus_to_exitcode(status)
            self._reply.close()
        return self.returncode

    def kill(self):
        """End it with SIGKILL; nothing happens to one that has ended and was waited for."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def run(code, *arguments, input="", cwd=None, env=None, timeout=240):
    """Run code as ``python -c`` would, with `arguments` and `input`; return its code and its output, as texts.

    `env` is what its environment has besides this process's.
    """
    with contextlib.ExitStack() as files:
        stdin, stdout, stderr = (files.enter_context(open(os.memfd_create(name), "w+b")) for name in ("0", "1", "2"))
        stdin.write(input.encode())
        stdin.seek(0)
        child = Child(code, arguments, [file.fileno() for file in (stdin, stdout, stderr)], cwd, env or {})
        try:
            child.wait(timeout)
        except BaseException:
            child.kill()
            child.wait()
            raise
        said = [os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in (stdout, stderr)]
    return subprocess.CompletedProcess(["python", "-c", code, *arguments], child.returncode, *said)


@contextlib.contextmanager
def started(code, *arguments):
    """Start code as ``python -c`` would; yield the process, `stdout` a pipe in bytes, and end it at the end."""
    ours, theirs = os.pipe()
    with open(ours, "rb", buffering=0) as stdout:
        try:
            with open(os.devnull, "rb") as nothing:
                child = Child(code, arguments, [nothing.fileno(), theirs, 2], None, {})
        finally:
            os.close(theirs)
        child.stdout = stdout
        try:
            yield child
        finally:
            child.kill()
            child.wait()


_starting = threading.Lock()


def _server():
    with _starting:
        return _begin()


@functools.cache
def _begin():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), str(theirs.fileno()), json.dumps(sys.path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            # A pool of threads would make each fork one of a process with threads.
            env={**os.environ, "LD_PRELOAD": PRELOAD, "OPENBLAS_NUM_THREADS": "1"},
        ).returncode = 0  # it ends with this process, which does not wait for it
    atexit.register(ours.close)
    return ours


# ---- the process that is forked ------------------------------------------------------------------------------------


def _serve(control):
    """Fork for every request; return in the child what it is to run, and never in the server."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, LARGEST_REQUEST, 4)
        if not request:
            os._exit(0)
        # Its parent is a keeper of its own, who waits for it and tells; who started it is nobody's parent.
        if os.fork():
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        control.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        with socket.socket(fileno=descriptors.pop()) as reply:
            if child:
                for descriptor in descriptors:
                    os.close(descriptor)
                with contextlib.suppress(OSError):  # nobody may be there to be told
                    reply.send(b"%d" % child)
                    reply.send(b"%d" % os.waitpid(child, 0)[1])
                os._exit(0)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return json.loads(request)


def main():
    """Import, serve; in each child, be what ``python -c`` is."""
    # As in an interpreter that was started with -c, and what the tests can import.
    own = sys.path[1:]
    sys.path[:] = ["", *own, *(path for path in json.loads(sys.argv[2]) if path not in own)]
    for name in MODULES.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    del os.environ["OPENBLAS_NUM_THREADS"]
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    code, arguments, cwd, environment = _serve(socket.socket(fileno=int(sys.argv[1])))
    os.chdir(cwd)
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    program = {"__name__": "__main__", "__builtins__": __builtins__}
    status = _ran(code, program)
    threading._shutdown()
    atexit._run_exitfuncs()
    program.clear()
    gc.collect()
    for file in (sys.stdout, sys.stderr):
        file.flush()
    os._exit(status)


def _ran(code, program):
    """Run the program; return its exit code as the interpreter would."""
    try:
        exec(compile(code, "<string>", "exec"), program)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__.tb_next)
        return 1
    return 0


if __name__ == "__main__":
    main()
