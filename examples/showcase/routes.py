"""The endpoints, each of which declares its user and its service."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import StreamingResponse

from examples.showcase.dependencies import CurrentUser, ReadingUser
from examples.showcase.models import Account, LedgerEntry
from examples.showcase.schemas import (
    AccountPublic,
    EventSummary,
    LedgerEntryPublic,
    TransferOrder,
)
from examples.showcase.services import LedgerExport, Statements, Statistics, Transfers

router = APIRouter()


@router.post("/transfers", status_code=201, response_model=list[LedgerEntryPublic])
async def transfer(
    user: CurrentUser, order: TransferOrder, transfers: Annotated[Transfers, Depends()]
) -> list[LedgerEntry]:
    """Move money from one of your accounts to any other account."""
    return await transfers.transfer(user, order)


@router.get("/accounts", response_model=list[AccountPublic])
async def list_accounts(
    user: ReadingUser, statements: Annotated[Statements, Depends()]
) -> Sequence[Account]:
    """List your accounts."""
    return await statements.accounts(user)


@router.get("/ledger", response_model=list[LedgerEntryPublic])
async def list_ledger(
    user: ReadingUser, statements: Annotated[Statements, Depends()]
) -> Sequence[LedgerEntry]:
    """List your accounts' ledger entries, newest first."""
    return await statements.ledger(user)


@router.get("/ledger/export", response_class=StreamingResponse)
async def export_ledger(
    user: ReadingUser, export: Annotated[LedgerExport, Depends()]
) -> StreamingResponse:
    """Stream all of your accounts' ledger entries as lines of JSON."""
    return StreamingResponse(export.lines(user), media_type="application/x-ndjson")


@router.get("/statistics")
async def list_statistics(statistics: Annotated[Statistics, Depends()]) -> list[EventSummary]:
    """Summarise the events, from the second database."""
    return await statistics.events()
