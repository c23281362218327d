"""The house: a file imports from the floors above it alone, and no two files import one another."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lit_multiip"

# Floors from the top. A photo walks down them; every import, deferred and TYPE_CHECKING ones included, leads up.
FLOORS = (
    ("files", "pixels", "runs"),
    ("data",),
    ("backbone",),
    ("methods", "datasets", "requested", "datamodule"),
    ("evaluation",),
    ("callbacks", "finite", "resume", "export", "pretrained", "tuning", "personalizer"),
    ("console", "defaults", "cli"),
    ("comparison", "tools", "mini"),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, less the package's own."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}


def imports() -> dict[str, set[str]]:
    """What each module imports of the package, at whatever depth of the file; packages themselves are not edges."""
    known = modules()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            wanted: list[str] = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{name} imports relatively: write the whole name"
                below = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted = [module if module.removeprefix("lit_multiip.") in known else node.module for module in below]
            inside = {module.removeprefix("lit_multiip.") for module in wanted if module.startswith("lit_multiip.")}
            found[name] |= inside & known.keys() - {name}
    return found


def test_every_module_has_a_floor():
    assert {name.split(".")[0] for name in modules()} <= FLOOR.keys()


def test_every_import_leads_to_the_same_floor_or_one_above():
    wrong = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if FLOOR[other.split(".")[0]] > FLOOR[name.split(".")[0]]
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_two_modules_import_one_another():
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' -> '.join(error.args[1])}") from None
