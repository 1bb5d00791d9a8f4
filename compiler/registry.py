"""Finding techniques and backends by file name, importing them on demand.

A pass called `rtn` is the class with `name = "rtn"` in `graphwright/passes/<family>/rtn.py`. There is no list to
edit and nothing happens on import.
"""

import functools
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from graphwright.errors import BackendError, RecipeError, nearest

if TYPE_CHECKING:
    from graphwright.backend import Backend
    from graphwright.export_format import Format
    from graphwright.pass_ import Pass

PASSES, BACKENDS, FORMATS = "graphwright.passes", "graphwright.backends", "graphwright.formats"


@functools.cache
def pass_files() -> dict[str, str]:
    """Module path of every pass, by the pass's name."""
    return {
        module.rpartition(".")[2]: module
        for module in _modules(PASSES)
        if not module.rpartition(".")[2].startswith("_")
    }


def pass_class(name: str) -> "type[Pass]":
    """The pass called `name`.

    Raises:
        RecipeError: there is none; the nearest name is given.
    """
    files = pass_files()
    if name not in files:
        raise RecipeError(f"Unknown pass {name!r}", fix=nearest(name, files))
    module = importlib.import_module(files[name])
    for value in vars(module).values():
        if getattr(value, "name", None) == name and isinstance(value, type):
            return value
    raise RecipeError(f"{files[name]} defines no pass called {name!r}", fix="Set name = the file's name")


def all_passes() -> "dict[str, type[Pass]]":
    """Every pass by name."""
    return {name: pass_class(name) for name in sorted(pass_files())}


def providers(prop: str) -> "list[type[Pass]]":
    """Passes that provide a property."""
    return [cls for cls in all_passes().values() if prop in cls.provides]


@functools.cache
def backend_names() -> tuple[str, ...]:
    """Names of the installed backends: the sub-packages of `graphwright.backends`."""
    root = importlib.import_module(BACKENDS)
    return tuple(sorted(info.name for info in pkgutil.iter_modules(root.__path__) if info.ispkg))


def backend(name: str) -> "Backend":
    """The backend called `name`.

    Raises:
        BackendError: there is none, and the nearest name is given; or a package that it needs is not installed.
    """
    if name not in backend_names():
        raise BackendError(f"Unknown backend {name!r}", fix=nearest(name, backend_names()))
    module = _with_extra(f"{BACKENDS}.{name}", f"Backend {name}", name)
    if not hasattr(module, "BACKEND"):
        raise BackendError(
            f"{name} is a format to export to, and compiles nothing",
            fix=f"graphwright export --format {name.replace('_', '-')}",
        )
    made: Backend = module.BACKEND
    return made


@functools.cache
def format_files() -> dict[str, str]:
    """Module path of every export format, by the format's name. None of them is imported.

    A format `some-name` is `graphwright/formats/some_name.py`, or the `exporter` of the backend `some_name`.
    """
    found = {module.rpartition(".")[2]: module for module in _modules(FORMATS)}
    folders = [Path(folder) for folder in importlib.import_module(BACKENDS).__path__]
    for name in backend_names():
        if any((folder / name / "exporter.py").is_file() for folder in folders):
            found[name] = f"{BACKENDS}.{name}.exporter"
    return {name.replace("_", "-"): module for name, module in found.items() if not name.startswith("_")}


def export_format(name: str) -> "Format":
    """The export format called `name`.

    Raises:
        BackendError: there is none, and the nearest name is given; or a package that it needs is not installed.
    """
    files = format_files()
    if name not in files:
        raise BackendError(f"Unknown export format {name!r}", fix=nearest(name, files))
    made: Format = _with_extra(files[name], f"Format {name}", name).FORMAT
    return made


def _with_extra(module: str, what: str, extra: str) -> Any:
    """Imports a module of ours that may need packages of an extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "graphwright":
            raise  # A defect of ours: no package that a user could install helps.
        raise BackendError(
            f"{what} needs the package {error.name}, which is not installed",
            fix=f"pip install 'graphwright[{extra}]'",
        ) from error


def _modules(package: str) -> list[str]:
    root: ModuleType = importlib.import_module(package)
    walked = pkgutil.walk_packages(root.__path__, prefix=f"{package}.")
    return sorted(info.name for info in walked if not info.ispkg)
