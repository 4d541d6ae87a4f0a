"""Tests of validation over HTTP, and of the agreement between model and table."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import pytest
from pydantic import BaseModel, Field, create_model
from sqlalchemy import Engine, String, event, inspect

from examples.validation.app import NewProduct, Product, create_app
from tests.serving import serve

LAMP = {"sku": "LAMP-7", "name": "Lamp", "price": 30}


@pytest.mark.usefixtures("databases")
def test_known_fields_are_coerced() -> None:
    """Spaces, capitals and a quoted number are normalised before they are stored."""
    with serve(create_app()) as served:
        sent = {"sku": " lamp-7 ", "name": "Lamp ", "price": "30"}
        answer = served.client.post("/products", json=sent)
        assert answer.status_code == 201
        assert answer.json() == LAMP | {"id": 1, "note": None}


REJECTED: dict[str, dict[str, Any]] = {
    "a field that is the server's": {"id": 99},
    "a field that nobody knows": {"colour": "red"},
    "too little": {"price": 0},
    "more than the column holds": {"price": 2**31},
    "no number": {"price": "a lot"},
    "no such pattern": {"sku": "LAMP-7; --"},
    "longer than the column": {"name": "L" * 41},
    "null where the column has none": {"name": None},
}


@pytest.mark.usefixtures("databases")
def test_a_422_sends_the_database_nothing(subtests: pytest.Subtests) -> None:
    """A rejected request stores nothing, and its session sends no statement."""
    statements: list[str] = []
    with serve(create_app()) as served, listening(statements):
        for name, change in REJECTED.items():
            statements.clear()
            with subtests.test(name):
                assert served.client.post("/products", json=LAMP | change).status_code == 422
                assert statements == []
                assert served.client.get("/products/count").json() == 0
                assert len(statements) == 1  # so the empty list above is significant


@contextmanager
def listening(statements: list[str]) -> Generator[None]:
    """Record the statements that any engine sends."""

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield
    event.remove(Engine, "before_cursor_execute", note)


# --- the agreement of model and table ---

JSON_TYPES = {str: "string", int: "integer"}


class Shape(NamedTuple):
    """The properties that model and column must agree on."""

    type: str
    max_length: int | None
    nullable: bool
    required: bool


def sent(model: type[BaseModel]) -> dict[str, Shape]:
    """Read the shapes that clients may send from the model's OpenAPI schema."""
    schema = model.model_json_schema()
    shapes = {}
    for name, described in schema["properties"].items():
        options = {each["type"]: each for each in described.get("anyOf", [described])}
        nullable = options.pop("null", None) is not None
        ((type_, option),) = options.items()
        required = name in schema["required"]
        shapes[name] = Shape(type_, option.get("maxLength"), nullable, required)
    return shapes


def stored() -> dict[str, Shape]:
    """Read the shapes that the table stores, except the generated key."""
    return {
        column.name: Shape(
            JSON_TYPES[column.type.python_type],
            column.type.length if isinstance(column.type, String) else None,
            bool(column.nullable),
            not column.nullable and column.default is None and column.server_default is None,
        )
        for column in inspect(Product).columns
        if not column.primary_key
    }


def test_model_and_table_agree() -> None:
    """What clients may send matches what the table can store, field by field."""
    assert sent(NewProduct) == stored()


@pytest.mark.parametrize(
    "drifted",
    [
        pytest.param({"colour": (str, ...)}, id="a field too many"),
        pytest.param({"price": (str, ...)}, id="another type"),
        pytest.param({"price": (int | None, ...)}, id="null"),
        pytest.param({"price": (int, 0)}, id="not required"),
        pytest.param({"name": (Annotated[str, Field(max_length=41)], ...)}, id="a length"),
        pytest.param({"name": (str, ...)}, id="no length"),
        pytest.param({"note": (str, ...)}, id="no null"),
    ],
)
def test_drift_is_found(drifted: dict[str, Any]) -> None:
    """A model that differs does not match."""
    assert sent(create_model("Drifted", __base__=NewProduct, **drifted)) != stored()
