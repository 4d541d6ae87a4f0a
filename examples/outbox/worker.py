"""The worker, which moves each message from one database to the other at least once."""

import asyncio
import logging

from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import SQLAlchemyError

from examples.outbox.models import Message, Parcel
from fastapi_sqlnative import AsyncDatabase

logger = logging.getLogger("examples.outbox")


async def carry_on(source: AsyncDatabase, target: AsyncDatabase, *, limit: int = 100) -> int:
    """Move up to `limit` messages and return how many.

    They are locked until they are deleted, and other workers skip them. The target commits first.
    If a worker is killed between the two COMMITs, the messages stay where they are, and are
    delivered again to a target that ignores those it has.
    """
    async with source.transaction() as session:
        query = select(Message).order_by(Message.id).limit(limit)
        messages = (await session.scalars(query.with_for_update(skip_locked=True))).all()
        if not messages:
            return 0
        async with target.transaction() as receiving:
            parcels = [{"message_id": each.id, "item": each.item} for each in messages]
            await receiving.execute(insert(Parcel).on_conflict_do_nothing(), parcels)
        ids = [each.id for each in messages]
        await session.execute(delete(Message).where(Message.id.in_(ids)))
    return len(messages)


async def run(source: AsyncDatabase, target: AsyncDatabase, *, pause: float = 0.2) -> None:
    """Deliver until cancelled; when nothing is left, poll again after `pause` seconds."""
    while True:
        try:
            moved = await carry_on(source, target)
        except (SQLAlchemyError, OSError):  # a database is unreachable: the messages wait
            logger.exception("Messages could not be carried on; they are tried again.")
            moved = 0
        if not moved:
            await asyncio.sleep(pause)
