"""The layout of the package, as far as tests can check it."""

import ast
import functools
import tomllib
from collections.abc import Iterator
from pathlib import Path

import fastapi_sqlnative

PACKAGE = Path(fastapi_sqlnative.__file__).parent

# A module may import those of the rows above its own. A new module must be added to a row.
ORDER = (
    {"exceptions"},
    {
        "_drivers.__init__",
        "_drivers.connections",
        "_drivers.details",
        "_drivers.pools",
        "_routes",
        "_functions",
    },
    {"_drivers.errors"},
    {"_drivers.failures"},
    {"_drivers.transactions"},
    {"_drivers.statements", "_drivers.results"},
    {"errors._kinds"},
    {"errors._rules"},
    {"errors._formats"},
    {"errors._answers"},
    {"errors.__init__"},
    {"_sessions.__init__", "_sessions.options"},
    {"_sessions.shared", "_sessions.transaction"},
    {"_sessions.completion", "_sessions.holders"},
    {"_sessions.engines"},
    {"_sessions.record"},
    {"_sessions.session"},
    {"_sessions.factory", "_sessions.finishing"},
    {"_probe", "_retries"},
    {"databases"},
    {"_lifespan.__init__"},
    {"_lifespan.gate"},
    {"_lifespan.running"},
    {"_unit_of_work"},
    {"dependencies"},
    {"cancellation"},
    {"_lifespan.routes"},
    {"_lifespan.lifespan"},
    {"_lifespan.install"},
    {"health._watch"},
    {"health._router"},
    {"health.__init__", "telemetry"},
    {"migrations"},
    {"checklist._findings", "checklist._questions"},
    {"checklist._asking"},
    {"checklist.__init__"},
    {"__init__", "__main__"},
    {"testing._targets"},
    {"testing._turns", "testing._databases"},
    {"testing._connections"},
    {"testing._sessions", "testing._capture", "testing._client", "testing._faults"},
    {"testing._isolation"},
    {"testing.__init__"},
    {"testing.fixtures"},
)
RANK = {module: rank for rank, row in enumerate(ORDER) for module in row}
FRAMEWORKS = ("fastapi", "starlette", "sqlalchemy", "anyio", "asyncio")


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Return the syntax trees of the package's modules, by name."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(PACKAGE.glob("**/*.py"))
    }


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (module, name) for each import at any depth, with the dots of a relative import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((module, alias.name) for alias in node.names)


def own(module: str) -> Iterator[str]:
    """Yield the modules of this package that a module imports."""
    here = module.split(".")
    for origin, name in imports(modules()[module]):
        path = origin.lstrip(".")
        if origin.startswith("."):
            above = here[: len(here) - (len(origin) - len(path))]
            path = ".".join([*above, *filter(None, [path])])
        elif path.partition(".")[0] == "fastapi_sqlnative":
            path = path.partition(".")[2]
        else:
            continue
        found = [f"{path}.{name}".lstrip("."), path, f"{path}.__init__".lstrip(".")]
        yield next(each for each in found if each in modules())


def is_private(dotted: str) -> bool:
    return any(part.startswith("_") and part != "__future__" for part in dotted.split("."))


def test_imports_point_downward_only() -> None:
    """A module imports only from modules in the rows above its own in `ORDER`."""
    assert RANK.keys() >= modules().keys(), "a module has no place in ORDER yet"
    assert not {
        f"{module} imports {each}"
        for module in modules()
        for each in own(module)
        if RANK[each] >= RANK[module]
    }


def test_nobody_imports_what_is_for_tests() -> None:
    """No module outside the testing toolkit imports it."""
    assert not {
        module
        for module in modules()
        if module.partition(".")[0] != "testing"
        and "testing" in {each.partition(".")[0] for each in own(module)}
    }


def test_no_private_name_of_a_framework_is_imported() -> None:
    """No module imports a private name of FastAPI, Starlette, SQLAlchemy, AnyIO or asyncio."""
    assert not {
        f"{module}: {origin}.{name}"
        for module, tree in modules().items()
        for origin, name in imports(tree)
        if origin.partition(".")[0] in FRAMEWORKS and is_private(f"{origin}.{name}".strip("."))
    }


def test_no_private_attribute_of_another_object_is_used() -> None:
    """A private attribute is used only on `self` or `cls`, or in a module that sets it on `self`.

    Access by name, as with `getattr`, is limited to the cases listed here.
    """
    assert not {
        f"{module}: {ast.unparse(node)}"
        for module, tree in modules().items()
        for node in foreign_private_attributes(tree)
    }
    by_name = {
        ast.unparse(node)
        for tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"getattr", "setattr", "hasattr"}
        and isinstance(node.args[1], ast.Constant)
        and is_private(str(node.args[1].value))
        and not str(node.args[1].value).startswith("__")
    }
    # Each is allowed in one named place, with a reason and a fallback.
    assert by_name <= {
        "getattr(pool, '_max_overflow', None)",
        "getattr(pool, '_pre_ping', None)",
        "getattr(app, '_telemetry', {})",
        "getattr(statement, '_generate_cache_key', bool)",
    }


def foreign_private_attributes(tree: ast.Module) -> list[ast.Attribute]:
    """List the uses of other objects' private attributes that the module does not set on `self`."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own = {
        node.attr
        for node in attributes
        if isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return [
        node
        for node in attributes
        if node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in own
        and not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"})
    ]


def test_nothing_at_module_level_is_written_to() -> None:
    """No module of the package rebinds a global or writes to a container at module level."""
    trees = modules()
    assert not {
        name
        for name, tree in trees.items()
        if any(isinstance(node, ast.Global) for node in ast.walk(tree))
    }
    assert not {name: found for name, tree in trees.items() if (found := written_to(tree))}


def written_to(tree: ast.Module) -> set[str]:
    """Return the names of the containers at module level that the module writes to."""
    mutable = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
        and target.id != "__all__"
        and isinstance(node.value, ast.Dict | ast.List | ast.Set)
    }
    written = {
        node.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Store | ast.Del)
        and isinstance(node.value, ast.Name)
    }
    called = {
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.attr in {"append", "add", "update", "setdefault", "extend", "pop", "clear"}
    }
    return mutable & (written | called)


def test_the_face_is_sorted_and_complete() -> None:
    """`__all__` is sorted and lists exactly the names that the package imports for its users."""
    exported = fastapi_sqlnative.__all__
    assert exported == sorted(exported)
    assert set(exported) == {name for _, name in imports(modules()["__init__"])}


def test_exceptions_are_all_exported() -> None:
    """The `__all__` of `exceptions` is sorted and lists every class of the module."""
    from fastapi_sqlnative import exceptions

    classes = [node.name for node in modules()["exceptions"].body if isinstance(node, ast.ClassDef)]
    assert exceptions.__all__ == sorted(classes)


def test_there_are_two_hard_dependencies() -> None:
    """The package requires only FastAPI and SQLAlchemy, and the application chooses the rest."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    names = [each.partition(">")[0] for each in project["dependencies"]]
    assert names == ["fastapi", "sqlalchemy[asyncio]"]


def test_the_picture_shows_this_order() -> None:
    """The picture in the documentation shows the modules in this order.

    `python -m tests.architecture_picture` draws it again.
    """
    from tests.architecture_picture import PICTURE, draw

    assert PICTURE.read_text("utf-8") == draw(ORDER)
