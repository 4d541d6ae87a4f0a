"""A pytest plugin: every engine of the run has the arguments that PgBouncer wants."""

from typing import Any

from sqlalchemy import Engine, event

from tests.ha.test_pgbouncer import SETTINGS


@event.listens_for(Engine, "do_connect")
def add_settings(
    dialect: Any, record: object, arguments: object, parameters: dict[str, Any]
) -> None:
    """Do what an application does with connect_args, for engines that somebody else builds."""
    parameters.update(SETTINGS.get(dialect.driver, {}))
