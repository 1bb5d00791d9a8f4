"""Recipes: target-independent lists of passes with options, from YAML, Python or the shipped presets.

    name: int4
    description: 4-bit weights in groups of 64
    passes:
      - static_cache
      - rtn: {bits: 4, group_size: 64}
    budget: {kl: 0.5}

Raising passes are not listed: they are a stage of every compile. The manager orders the listed passes by what they
require and provide, and adds a required one that has only one provider. Approximate passes run in the order in which
they are listed, and an order in which they cannot work is refused: quantizing before pruning is something else than
pruning before quantizing. Exact and structural ones may be listed anywhere.
"""

import functools
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from graphwright import registry
from graphwright.errors import RecipeError, nearest
from graphwright.pass_ import Pass


class Budget(BaseModel):
    """The most that one approximate pass may cost; exceeding it stops the compile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kl: float | None = Field(None, gt=0, description="mean KL divergence of the logits, in nats per token")
    relative_error: float | None = Field(None, gt=0, description="largest relative error of the outputs")


class Recipe(BaseModel):
    """A named list of passes."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str = "custom"
    description: str = ""
    passes: tuple[Pass, ...] = ()
    budget: Budget = Budget()

    @field_validator("passes", mode="before")
    @classmethod
    def _build(cls, entries: Any) -> Any:
        if not isinstance(entries, (list, tuple)):
            raise RecipeError(f"The passes of a recipe are a list, not a {type(entries).__name__}")
        return tuple(make_pass(entry) for entry in entries)

    @staticmethod
    def load(source: "str | Path | Mapping[str, Any] | Recipe") -> "Recipe":
        """A recipe from a preset's name, the path of a YAML file, plain data, or itself.

        Raises:
            RecipeError: unknown name, key, pass or option, with the nearest right one.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return _validate(dict(source), "the recipe given")
        path = Path(source)
        if path.suffix in (".yaml", ".yml"):
            return _read(path)
        if str(source) in presets():
            return _read(Path(str(resources.files("graphwright.recipes") / f"{source}.yaml")))
        raise RecipeError(
            f"Unknown recipe {str(source)!r}",
            fix=f"{nearest(str(source), presets())}. Or give the path of a .yaml file",
        )

    @property
    def reads_codes(self) -> bool:
        """Whether a checkpoint that is quantized already is to be read with its codes."""
        return any(one.reads_codes for one in self.passes)

    def to_data(self) -> dict[str, Any]:
        """Plain data that `load` reads back."""
        return {
            "name": self.name,
            "description": self.description,
            "passes": [{p.name: p.model_dump(mode="json", exclude_defaults=True)} for p in self.passes],
            "budget": self.budget.model_dump(exclude_none=True),
        }


@functools.cache
def presets() -> tuple[str, ...]:
    """Names of the shipped recipes."""
    folder = resources.files("graphwright.recipes")
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def make_pass(entry: Any) -> Pass:
    """A pass from itself, its name, or `{name: options}`.

    Raises:
        RecipeError: unknown pass or option, or a value that is out of bounds.
    """
    if isinstance(entry, Pass):
        return entry
    if isinstance(entry, str):
        name, options = entry, None
    elif isinstance(entry, Mapping) and len(entry) == 1:
        ((name, options),) = entry.items()
    else:
        raise RecipeError(f"A pass is a name or one name with its options, not {entry!r}")
    cls = registry.pass_class(str(name))
    try:
        return cls(**(options or {}))
    except ValidationError as error:
        raise _explain(error, f"pass {name}", list(cls.model_fields)) from error
    except TypeError as error:
        raise RecipeError(f"The options of pass {name} are a mapping, not {options!r}") from error


def _read(path: Path) -> Recipe:
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"Recipe file {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"Recipe file {path} is not valid YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"Recipe file {path} holds no mapping",
            fix="Its keys are name, description, passes, budget",
        )
    return _validate({"name": path.stem, **data}, str(path))


def _validate(data: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe(**data)
    except ValidationError as error:
        raise _explain(error, where, list(Recipe.model_fields)) from error


def _explain(error: ValidationError, where: str, known: list[str]) -> RecipeError:
    """The first complaint of pydantic as one sentence, with the nearest right key."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        names = list(Budget.model_fields) if path.startswith("budget.") else known
        return RecipeError(f"Unknown option {path!r}", where=where, fix=nearest(path.rpartition(".")[2], names))
    if not path:
        return RecipeError(f"Options do not go together: {first['msg'].removeprefix('Value error, ')}", where=where)
    return RecipeError(f"Option {path} is {first['input']!r}: {first['msg']}", where=where)
