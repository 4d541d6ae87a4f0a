"""Projects of several tenants in one table: the session adds the tenant to every query."""

import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from examples.tenants_by_predicate.dependencies import TenantDb, Transaction, digest
from examples.tenants_by_predicate.models import AuditEntry, Base, Project, User
from examples.tenants_by_predicate.services import Archive, Projects
from examples.tenants_by_predicate.tenancy import TenantSession
from fastapi_sqlnative import install_database

router = APIRouter()


class NewProject(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a "tenant" in the body is refused

    name: str


class ProjectPublic(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    tenant: str
    name: str
    archived_at: datetime | None


@router.get("/projects", response_model=list[ProjectPublic])
async def list_projects(projects: Annotated[Projects, Depends()]) -> Sequence[Project]:
    """List your tenant's projects."""
    return await projects.all()


@router.get("/projects/{project_id}", response_model=ProjectPublic)
async def read_project(project_id: int, projects: Annotated[Projects, Depends()]) -> Project:
    """Read one of your tenant's projects."""
    return await projects.one(project_id)


@router.post("/projects", status_code=201, response_model=ProjectPublic)
async def add_project(
    new: NewProject, projects: Annotated[Projects, Depends()], _: Transaction
) -> Project:
    """Add a project; the session sets its tenant."""
    return await projects.add(Project(name=new.name))


@router.post("/projects/{project_id}/archive", response_model=ProjectPublic)
async def archive_project(project_id: int, archive: Annotated[Archive, Depends()]) -> Project:
    """Archive a project, with an audit entry."""
    return await archive.archive(project_id)


@router.get("/audit")
async def list_audit(session: TenantDb) -> list[str]:
    """List the audit entries."""
    return [
        f"{each.by} {each.action} {each.project_id}"
        for each in await session.scalars(select(AuditEntry).order_by(AuditEntry.id))
    ]


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL."""
    engine = create_async_engine(os.environ["DATABASE_URL"])

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        # At start-up for the demo only: in production, use Alembic.
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session, session.begin():
            for name, tenant in ("ada", "acme"), ("grace", "globex"), ("nobody", None):
                await session.merge(User(token_digest=digest(name), name=name, tenant=tenant))
        yield

    app = FastAPI(title="Tenants by predicate", lifespan=lifespan)
    install_database(
        app,
        engine=engine,
        shutdown=engine.dispose,
        session_options={"sync_session_class": TenantSession},
    )
    app.include_router(router)
    return app
