"""What the API takes and gives. Amounts are in cents."""

from datetime import datetime
from typing import Annotated, Self
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, model_validator

Word = Annotated[str, Field(pattern="^[A-Za-z0-9-]{1,40}$")]


class TransferOrder(BaseModel):
    """Ask for a transfer. With a reference of its own it can be sent again without paying twice."""

    source: Word
    target: Word
    amount: Annotated[int, Field(gt=0, le=1_000_000_00)]
    reference: Annotated[Word, Field(default_factory=lambda: uuid4().hex)]

    @model_validator(mode="after")
    def _between_two_accounts(self) -> Self:
        if self.source == self.target:
            raise ValueError("source and target are the same account")
        return self


class AccountPublic(BaseModel):
    """Show an account to its owner."""

    model_config = ConfigDict(from_attributes=True)

    number: str
    balance: int


class LedgerEntryPublic(BaseModel):
    """Show one side of a transfer."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    account: str
    reference: str
    amount: int
    booked_at: datetime


class EventSummary(BaseModel):
    """Sum up the events of one name."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    events: int
    amount: int
