"""A pytest plugin that adds the arguments for PgBouncer to every engine of the run."""

from typing import Any

from sqlalchemy import Engine, event

from tests.ha.test_pgbouncer import SETTINGS


@event.listens_for(Engine, "do_connect")
def add_settings(
    dialect: Any, record: object, arguments: object, parameters: dict[str, Any]
) -> None:
    """Add what an application would pass as connect_args, for engines that are built elsewhere."""
    parameters.update(SETTINGS.get(dialect.driver, {}))
