"""Fixtures of every test that meets Zarr and Icechunk: the package, its threads, and an S3 that can be made to fail."""

import threading
from itertools import count
from urllib.request import Request, urlopen

import pytest


@pytest.fixture
def icechunk():
    """The package, which says what is an error alone."""
    package = pytest.importorskip("icechunk")
    package.set_logs_filter("error")
    return package


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    """In place of the suite's: zarr keeps its threads for the next call, and so do servers, clients and Dask."""
    before = set(threading.enumerate())
    yield
    left = [each for each in threading.enumerate() if each not in before and each.name.startswith("dirtylog")]
    assert not left, f"still running: {left}"


class Faulty:
    """A WSGI application in front of another: one request, or some, of those to come are not served as asked.

    The line is cut, and the client tries again, ten times in half a minute; or the answer is a refusal, which it takes
    as the last word.
    """

    def __init__(self, app):
        self.app, self.requests, self.fail, self.how, self.refuses = app, 0, range(0), "before", False
        self.lock = threading.Lock()

    def arm(self, first, how, number=1, *, refuses=False):
        self.requests, self.fail, self.how, self.refuses = 0, range(first, first + number), how, refuses

    def disarm(self):
        self.arm(0, "before", 0)

    def __call__(self, environ, start_response):
        with self.lock:
            self.requests += 1
            fails = self.requests in self.fail
        if not fails:
            return self.app(environ, start_response)
        if self.how == "in":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
        if self.how == "after" and self.requests == self.fail.start:
            answer = self.app(environ, lambda *_: None)
            for _ in answer:
                pass
        if self.refuses:
            if self.how == "before":
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>made up</Message></Error>"]
        environ["werkzeug.socket"].shutdown(2)
        start_response("500 cut", [])
        return []


@pytest.fixture(scope="module")
def s3():
    """Storage options of a server, and what makes its requests fail."""
    icechunk = pytest.importorskip("icechunk")
    server = pytest.importorskip("moto.server")
    serving = pytest.importorskip("werkzeug.serving")
    icechunk.set_logs_filter("error")
    from dirtylog.sinks.store import repository

    class Quiet(serving.WSGIRequestHandler):
        def log_request(self, *_):
            pass

        def log_error(self, *_):
            pass

        def connection_dropped(self, error, environ=None):
            pass

    faulty = Faulty(server.DomainDispatcherApplication(server.create_backend_app))
    http = serving.make_server("127.0.0.1", 0, faulty, threaded=True, request_handler=Quiet)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, name="moto", daemon=True)
    thread.start()
    options = {
        "region": "us-east-1",
        "endpoint_url": f"http://127.0.0.1:{http.server_port}",
        "allow_http": True,
        "force_path_style": True,
        "network_stream_timeout_seconds": 2,
        "access_key_id": "test",
        "secret_access_key": "test",
    }
    buckets = (f"bucket-{number}" for number in count())

    def make():
        bucket = next(buckets)
        asked = Request(f"{options['endpoint_url']}/{bucket}", method="PUT")
        with urlopen(asked, timeout=30):
            pass
        make.bucket = bucket
        make.address = (
            f"s3://{bucket}/checkpoints?region=us-east-1&endpoint_url={options['endpoint_url']}"
            "&allow_http=true&force_path_style=true"
        )
        return repository(f"s3://{bucket}/arrays", **options)

    make.endpoint = options["endpoint_url"]
    yield make, faulty
    http.shutdown()
    thread.join()
    http.server_close()
