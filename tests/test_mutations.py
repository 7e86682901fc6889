"""The list of mutations names lines that are there: a line that changes takes its mutation along."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_mutation_on_the_list_changes_exactly_one_place(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "tools" / "mutate.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutate", module)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    mutations = module.read_mutations()
    assert len(mutations) >= 30
    places = {mutation.name: (ROOT / mutation.file).read_text().count(mutation.old) for mutation in mutations}
    assert {name: count for name, count in places.items() if count != 1} == {}
    assert [mutation.name for mutation in mutations if mutation.old == mutation.new] == []
