"""Documents of several tenants in one table; no query mentions a tenant."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict
from sqlalchemy import make_url, select
from sqlalchemy.ext.asyncio import AsyncSession

from examples.tenants_by_row_security.database import (
    TenantSession,
    build_engine,
    check_row_security,
    digest,
    tenant_is,
)
from examples.tenants_by_row_security.models import Comment, Document, User
from fastapi_sqlnative import (
    AsyncDatabase,
    ErrorRule,
    get_db,
    http_errors,
    install_database,
    installed_databases,
    transactional,
)

router = APIRouter()
Db = Annotated[AsyncSession, Depends(get_db())]
Credentials = Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]


async def tenant_of_the_user(credentials: Credentials, session: Db) -> str:
    """Take the tenant from the authenticated user, never from the request's data."""
    user = await session.get(User, digest(credentials.credentials))
    if user is None:
        raise HTTPException(401, "Unknown token.")
    if user.tenant is None:
        raise HTTPException(403, "You belong to no tenant.")
    return user.tenant


async def tenant_db(
    session: Db, tenant: Annotated[str, Depends(tenant_of_the_user)]
) -> AsyncSession:
    """Set the tenant of the request's session."""
    session.info["tenant"] = tenant  # from the next BEGIN on
    await session.execute(select(tenant_is(tenant)))  # and in the current transaction
    return session


TenantDb = Annotated[AsyncSession, Depends(tenant_db)]
Transaction = Annotated[AsyncSession, Depends(transactional())]


class NewDocument(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a "tenant" in the body is refused

    title: str


class DocumentPublic(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    tenant: str
    title: str


class NewComment(BaseModel):
    text: str


async def own_document(document_id: int, session: TenantDb) -> Document:
    """Find a document; another tenant's document does not exist for this one."""
    document = await session.get(Document, document_id)
    if document is None:
        raise HTTPException(404, "No such document.")
    return document


OwnDocument = Annotated[Document, Depends(own_document)]


@router.get("/documents", response_model=list[DocumentPublic])
async def list_documents(session: TenantDb) -> list[Document]:
    """List this tenant's documents."""
    return list(await session.scalars(select(Document).order_by(Document.id)))


@router.get("/documents/{document_id}", response_model=DocumentPublic)
async def read_document(document: OwnDocument) -> Document:
    """Read one document."""
    return document


@router.post("/documents", status_code=201, response_model=DocumentPublic)
async def add_document(new: NewDocument, session: TenantDb, _: Transaction) -> Document:
    """Add a document; the server sets its tenant."""
    document = Document(title=new.title)
    session.add(document)
    await session.flush()
    return document


@router.put("/documents/{document_id}", response_model=DocumentPublic)
async def rename_document(new: NewDocument, document: OwnDocument, _: Transaction) -> Document:
    """Rename a document."""
    document.title = new.title
    return document


@router.post("/documents/{document_id}/comments", status_code=201)
async def add_comment(document_id: int, new: NewComment, session: TenantDb, _: Transaction) -> int:
    """Comment on a document; the foreign key accepts only the tenant's own."""
    comment = Comment(document_id=document_id, text=new.text)
    async with http_errors(session, missing_parent=ErrorRule("No such document.", 404)):
        session.add(comment)
    return comment.id


def create_app(*, pool_size: int = 5) -> FastAPI:
    """Build the application, using the owner's DATABASE_URL; it serves as another role."""
    owner = make_url(os.environ["DATABASE_URL"])

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        database = installed_databases(app, AsyncDatabase)["default"]
        async with database.session() as session:
            await check_row_security(session)
        yield

    app = FastAPI(title="Tenants by row security", lifespan=lifespan)
    install_database(
        app,
        engine=partial(build_engine, owner, pool_size),
        session_options={"sync_session_class": TenantSession},
    )
    app.include_router(router)
    return app
