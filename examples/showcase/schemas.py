"""The API's request and response models. Amounts are in cents."""

from datetime import datetime
from typing import Annotated, Self
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, model_validator

Word = Annotated[str, Field(pattern="^[A-Za-z0-9-]{1,40}$")]


class TransferOrder(BaseModel):
    """A transfer order. With its own reference, it can be sent again without paying twice."""

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
    """An account, as shown to its owner."""

    model_config = ConfigDict(from_attributes=True)

    number: str
    balance: int


class LedgerEntryPublic(BaseModel):
    """One side of a transfer."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    account: str
    reference: str
    amount: int
    booked_at: datetime


class EventSummary(BaseModel):
    """The number of events with one name."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    events: int
    amount: int
