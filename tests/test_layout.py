"""The layout: which module may import which, how many rooms there are, and the paths that other people's code names."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

import dirtylog as dl

PACKAGE = Path(dl.__file__).parent
# From the roof to the ground: a module imports from its own floor's room and from the floors below, never from above.
# `log` knows neither sources nor vm; these two do not know each other.
MAY_IMPORT = {
    "commands": {"fleet", "sinks", "log", "sources", "vm", "core", "bits", "ground", "reference", "top"},
    "fleet": {"sinks", "log", "sources", "core", "bits", "ground"},
    "sinks": {"log", "sources", "core", "bits", "ground"},
    "log": {"core", "bits", "ground"},
    "sources": {"core", "bits", "ground"},
    "vm": {"core", "bits", "ground"},
    "reference": {"ground"},
    "core": {"bits", "ground"},
    "bits": {"ground"},
    "ground": set(),
    # The public names; each is imported where it is.
    "top": {"log", "sources", "vm", "core", "bits", "ground"},
}
FLOORS = {
    "agent": "commands",
    "cli": "commands",
    "__main__": "commands",
    "commands": "commands",
    "fleet": "fleet",
    "sinks": "sinks",
    "log": "log",
    "epochs": "log",
    "_log": "log",
    "sources": "sources",
    "vm": "vm",
    "reference": "reference",
    "_core": "core",
    "capi": "core",
    "_bits": "bits",
    "_kvm_arguments": "bits",
    "errors": "ground",
    "include": "ground",
    "_public": "ground",
    "_typing": "ground",
}


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    return (path / "__init__.py").exists() or any(path.with_suffix(end).exists() for end in (".py", ".pyx", ".pyi"))


def targets(module, names):
    """The modules that ``from module import names`` loads: a name may be a module itself."""
    return {f"{module}.{name}" if is_module(f"{module}.{name}") else module for name in names}


def typing_only(tree):
    """The nodes that only a type checker sees: the body of ``if TYPE_CHECKING``, its ``else`` not."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            found.update(id(below) for inside in node.body for below in ast.walk(inside))
    return found


def absolute(module, package, level):
    """What ``from`` names, with the dots before it resolved."""
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - level + 1], *filter(None, [module])]) if level else module


def imports_of_python(path, package="dirtylog"):
    """Every import of a file, in functions too, also by ``import_module``, but those for type checkers alone."""
    tree = ast.parse(path.read_text())
    skipped, found = typing_only(tree), set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            found |= targets(absolute(node.module, package, node.level), [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            # A name that is put together counts as the package it begins with.
            first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(first, ast.Constant):
                found.add(first.value.rpartition(".")[0] if first is not node.args[0] else first.value)
    return found


FROM = re.compile(r"^[ \t]*from ([\w.]+) c?import (?:\(([^)]*)\)|(.*))$", re.MULTILINE)
PLAIN = re.compile(r"^[ \t]*c?import ([\w., ]+)", re.MULTILINE)
HEADER = re.compile(r"""^[ \t]*(?:#[ \t]*include|cdef extern from) "([\w./]+)\"""", re.MULTILINE)


def imports_of_cython(path, package="dirtylog"):
    """Every import and cimport of a .pyx or .pxd file."""
    found, text = set(), path.read_text()
    for module, many, few in FROM.findall(text):
        names = [name.partition(" as ")[0].strip() for name in (many or few.partition("#")[0]).split(",")]
        level = len(module) - len(module.lstrip("."))
        found |= targets(absolute(module[level:], package, level), [name for name in names if name])
    for names in PLAIN.findall(text):
        found |= {name.partition(" as ")[0].strip() for name in names.split(",")}
    return found


def headers_of(path):
    """Every header of ours that a C or Cython file includes, as a dotted path."""
    found = set()
    for name in HEADER.findall(path.read_text()):
        for folder in (path.parent, PACKAGE, PACKAGE / "include"):
            if (folder / name).exists():
                found.add(".".join((folder / name).relative_to(PACKAGE.parent).parts))
                break
    return found


def floor_of(module):
    parts = module.split(".")
    if len(parts) == 1:
        return "top"
    assert parts[1] in FLOORS, f"{module}: say in FLOORS of this test on which floor dirtylog/{parts[1]} is"
    return FLOORS[parts[1]]


def edges():
    for path in sorted(PACKAGE.rglob("*.py")):
        module = module_of(path)
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        for target in imports_of_python(path, package):
            yield module, target
    for end in ("*.pyx", "*.pxd"):
        for path in sorted(PACKAGE.rglob(end)):
            for target in imports_of_cython(path, module_of(path).rpartition(".")[0]) | headers_of(path):
                yield module_of(path), target
    for end in ("*.c", "*.h"):
        for path in sorted(PACKAGE.rglob(end)):
            for target in headers_of(path):
                yield ".".join(path.relative_to(PACKAGE.parent).parts), target


def uphill(arrows):
    """The imports that go against the rule."""
    wrong = []
    for module, target in arrows:
        if target.split(".")[0] != "dirtylog":
            continue
        floor, below = floor_of(module), floor_of(target)
        if floor != below and below not in MAY_IMPORT[floor]:
            wrong.append(f"{module} ({floor}) imports {target} ({below})")
    return wrong


def circles(arrows):
    """The modules that can reach themselves by imports."""
    graph = {}
    for module, target in arrows:
        if target.split(".")[0] == "dirtylog" and target != module and not module.startswith(target + "."):
            graph.setdefault(module, set()).add(target)

    def reachable(start):
        seen, ahead = set(), list(graph.get(start, ()))
        while ahead:
            node = ahead.pop()
            if node not in seen:
                seen.add(node)
                ahead.extend(graph.get(node, ()))
        return seen

    return sorted(module for module in graph if module in reachable(module))


@pytest.fixture(scope="module")
def arrows():
    # A .pyi beside a .pyx describes it; what it imports is for checkers.
    return sorted(set(edges()))


def test_imports_run_one_way(arrows):
    assert len(arrows) > 200
    assert uphill(arrows) == []


def test_no_module_imports_itself_in_a_circle(arrows):
    assert circles(arrows) == []


@pytest.mark.parametrize(
    "wrong",
    [
        ("dirtylog.sinks.snapshot.writer", "dirtylog.commands.demo"),
        ("dirtylog.log", "dirtylog.sources.shared"),
        ("dirtylog.log", "dirtylog.vm.machine"),
        ("dirtylog.sources.shared", "dirtylog.sinks.rate"),
        ("dirtylog._bits.pages", "dirtylog._core"),
        ("dirtylog.errors", "dirtylog.log"),
        ("dirtylog._bits.simd.c", "dirtylog.vm._mmu.h"),
        ("dirtylog.include.dirtylog.bits.h", "dirtylog._bits.simd.h"),
    ],
)
def test_an_import_from_above_is_found(arrows, wrong):
    assert len(uphill([*arrows, wrong])) == 1


def test_a_circle_is_found(arrows):
    assert circles([*arrows, ("dirtylog.sinks.forecast", "dirtylog.sinks.plot")])


def test_a_sink_that_imports_a_command_is_found_in_its_text(tmp_path):
    path = tmp_path / "sink.py"
    path.write_text("def late():\n    from dirtylog.commands import demo\n")
    assert imports_of_python(path) == {"dirtylog.commands.demo"}
    path.write_text("from dirtylog._core cimport (\n    DirtyBitmap,\n    dl_bitmap,\n)\n")
    assert imports_of_cython(path) == {"dirtylog._core"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from ..commands import demo", {"dirtylog.commands.demo"}),
        ("from .plot import heat_map", {"dirtylog.sinks.plot"}),
        ("from . import plot", {"dirtylog.sinks.plot"}),
        ("importlib.import_module('dirtylog.commands.demo')", {"dirtylog.commands.demo"}),
        ("import_module(f'dirtylog.commands.{name}')", {"dirtylog.commands"}),
        ("if TYPE_CHECKING:\n    import dirtylog.cli\nelse:\n    import dirtylog.log", {"dirtylog.log"}),
    ],
)
def test_no_way_to_import_goes_unseen(tmp_path, text, found):
    path = tmp_path / "sink.py"
    path.write_text(text)
    assert imports_of_python(path, "dirtylog.sinks") == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cimport dirtylog._core as core", {"dirtylog._core"}),
        ("import dirtylog.log, os", {"dirtylog.log", "os"}),
        ("from .._core cimport DirtyBitmap", {"dirtylog._core"}),
        ("from . cimport _bytes", {"dirtylog.sinks._bytes"}),
    ],
)
def test_no_way_to_cimport_goes_unseen(tmp_path, text, found):
    path = tmp_path / "sink.pyx"
    path.write_text(text)
    assert imports_of_cython(path, "dirtylog.sinks") == found


def test_headers_are_imports_too(tmp_path):
    path = tmp_path / "code.c"
    path.write_text('#include <stdio.h>\n#include "vm/_mmu.h"\n# include "dirtylog/bits.h"\n')
    assert headers_of(path) == {"dirtylog.vm._mmu.h", "dirtylog.include.dirtylog.bits.h"}


def room_of(module):
    return ".".join(module.split(".")[:3])


def test_no_source_knows_another(arrows):
    between = [
        (module, target)
        for module, target in arrows
        if target.startswith("dirtylog.sources.") and module.startswith("dirtylog.sources.")
        if room_of(module) != room_of(target) and not room_of(target).startswith("dirtylog.sources._")
    ]
    assert between == []


def test_no_sink_knows_a_source_but_those_that_find_or_track_the_memory_themselves(arrows):
    knowing = {room_of(module) for module, target in arrows if floor_of(module) == "sinks" and "sources" in target}
    # The profile finds the memory of a program, a checkpoint tracks the arrays it is given, a snapshot of a process
    # reads that process, and backups read a disk of QEMU's: one module each.
    doors = {"dirtylog.sinks.checkpoint", "dirtylog.sinks.profile", "dirtylog.sinks.snapshot", "dirtylog.sinks.store"}
    assert knowing == doors


def test_no_command_imports_another_command(arrows):
    commands = [
        (module, target)
        for module, target in arrows
        if module.startswith("dirtylog.commands.") and target.startswith("dirtylog.commands.")
    ]
    assert commands
    assert [target for _, target in commands if not target.rsplit(".", 1)[1].startswith("_")] == []


def test_the_house_is_small_enough_to_be_seen_at_a_glance():
    sources = {".py", ".pyx", ".pyi", ".pxd", ".c", ".h", ".typed"}
    files = [path.name for path in PACKAGE.iterdir() if path.suffix in sources or path.name == "py.typed"]
    rooms = [
        path.name
        for path in (PACKAGE / "sinks").iterdir()
        if (path.is_dir() and path.name != "__pycache__") or path.suffix in {".py", ".pyx"}
    ]
    assert len(files) <= 18, sorted(files)
    # Ten doors, and the room below them.
    assert len([room for room in rooms if not room.startswith("_")]) <= 10, sorted(rooms)
    assert [room for room in rooms if room.startswith("_") and room != "__init__.py"] == ["_bytes"]


PUBLIC = {
    "dirtylog": sorted(dl.__all__),
    "dirtylog.log": ["DirtyLog", "Epoch", "Observer", "Source"],
    "dirtylog.errors": ["BackendUnavailable", "DirtyLogError", "IncompleteLogWarning"],
    "dirtylog.reference": [],
    "dirtylog.capi": [],
    "dirtylog.vm.machine": ["VM"],
    "dirtylog.vm.vcpu": ["Vcpu"],
    "dirtylog.vm.memslots": ["Memslot"],
    "dirtylog.vm.arch": ["Arch", "find", "names", "register"],
    "dirtylog.vm.dirty_log": ["get_dirty_log"],
    "dirtylog.sources.kvm": [
        "VM",
        "Dtable",
        "Exit",
        "Kvm",
        "Probe",
        "Regs",
        "Segment",
        "Slot",
        "Sregs",
        "Vcpu",
        "probe",
    ],
    "dirtylog.sources.memory": ["BACKENDS", "Arena", "Tracker", "arena", "empty", "track", "zeros"],
    "dirtylog.fleet": [
        "Committed",
        "Coordinator",
        "Participant",
        "Prepared",
        "Reborn",
        "ShardedArray",
        "Standing",
        "Threads",
    ],
    "dirtylog.fleet.dask": ["Dask"],
    "dirtylog.fleet.traces": ["Machine", "Migrating", "Saves", "Saving", "Sweep", "sweep"],
    "dirtylog.agent": ["hand_over", "listen"],
    "dirtylog.sources.process": ["Area", "Process", "Region", "attach"],
    "dirtylog.sources.qemu": [
        "DirtyRate",
        "GuestRange",
        "MeasuredRate",
        "NbdClient",
        "PeerError",
        "QemuDisk",
        "Qmp",
        "QmpError",
        "guest_memory",
    ],
    "dirtylog.sources.shared": ["SharedLog"],
    "dirtylog.sources.vhost": ["VhostBackend", "VhostRequest"],
    "dirtylog.sinks.migrate": [
        "Control",
        "DirtyLimit",
        "Keys",
        "Listener",
        "ListenerProcess",
        "MigrationError",
        "NotConverging",
        "Policy",
        "Result",
        "Round",
        "Status",
        "connect",
        "receive",
        "send",
        "settle",
        "status",
    ],
    "dirtylog.sinks.plot": [],
    "dirtylog.sinks.checkpoint": ["Change", "Checkpoint", "Record", "export"],
    "dirtylog.sinks.profile": ["Hot", "Profile", "Profiler", "Sampler", "Snapshots"],
    "dirtylog.sinks.rate": ["RateMeter"],
    "dirtylog.sinks.forecast": ["Forecast", "forecast"],
    "dirtylog.sinks.report": ["report_html"],
    "dirtylog.sinks.snapshot": [
        "Entry",
        "Info",
        "Mapped",
        "Pruned",
        "SnapshotError",
        "catalog",
        "clean",
        "flatten",
        "info",
        "merge",
        "open",
        "prune",
        "read",
        "rebase",
        "restore",
        "save",
        "save_diff",
        "verify",
    ],
    "dirtylog.sinks.store": [
        "Advice",
        "BranchMoved",
        "ChunkMap",
        "InDoubt",
        "Mirror",
        "Saved",
        "StoreSink",
        "Version",
        "advise_chunks",
        "default_chunks",
        "history",
        "repository",
        "restore",
        "state_of",
    ],
    "dirtylog.sinks.snapshot.disks": ["Backup", "back_up", "restore_disk"],
    "dirtylog.sinks.store.disks": ["StoredBackup", "back_up", "backups", "prune", "restore_disk", "verify"],
    "dirtylog.sinks.trace": ["Recorder", "Trace", "TraceEpoch", "TraceError", "record", "replay", "what_if"],
}


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_what_people_import_is_where_they_import_it(module):
    found = import_module(module)
    assert [name for name in PUBLIC[module] if not hasattr(found, name)] == []


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_a_public_name_says_a_module_that_is_public(module):
    for name in PUBLIC[module]:
        value = getattr(import_module(module), name)
        said = getattr(value, "__module__", None)
        if said is not None and said.startswith("dirtylog"):
            assert said in PUBLIC, f"{module}.{name} says {said}"
            assert getattr(import_module(said), value.__name__) is value


def files_with(*ends):
    return [path for end in ends for path in sorted(PACKAGE.rglob(f"*{end}"))]


def test_atomic_builtins_are_in_one_header():
    """Whoever reads about a memory order there knows where all of them are."""
    found = [path.name for path in files_with(".h", ".c", ".pyx", ".pxd") if "__atomic_" in path.read_text()]
    assert found == ["atomic.h"]


def test_each_header_of_ours_is_declared_to_cython_once():
    declared = {}
    for path in files_with(".pyx", ".pxd"):
        for header in re.findall(r'(?m)^cdef extern from "((?:dirtylog|_bits|s\w+|vm)/.*?)"', path.read_text()):
            declared.setdefault(header, set()).add(path.relative_to(PACKAGE).with_suffix("").as_posix())
    assert {header: where for header, where in declared.items() if len(where) > 1} == {}
    assert len(declared) > 10  # without the modules' sources, where they are not installed
