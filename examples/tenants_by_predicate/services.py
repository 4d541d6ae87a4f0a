"""Projects of the request's tenant. No query here mentions the tenant."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, HTTPException
from sqlalchemy import select

from examples.tenants_by_predicate.dependencies import CurrentUser, TenantDb, Transaction
from examples.tenants_by_predicate.models import AuditEntry, Project
from fastapi_sqlnative import http_errors


class Projects:
    """A repository of projects, which joins the request's transaction."""

    def __init__(self, session: TenantDb) -> None:
        self.session = session

    async def all(self) -> Sequence[Project]:
        """List this tenant's projects."""
        return (await self.session.scalars(select(Project).order_by(Project.id))).all()

    async def one(self, project_id: int) -> Project:
        """Find a project; another tenant's project does not exist for this one."""
        project = await self.session.get(Project, project_id)
        if project is None:
            raise HTTPException(404, "No such project.")
        return project

    async def add(self, project: Project) -> Project:
        """Add a project. Its name must be unique within the tenant."""
        async with http_errors(self.session, unique="There is a project of this name."):
            self.session.add(project)
        return project


class Archive:
    """The service that archives a project with its audit entry: both or neither."""

    def __init__(
        self, projects: Annotated[Projects, Depends()], user: CurrentUser, session: Transaction
    ) -> None:
        self.projects = projects
        self.user = user
        self.session = session

    async def archive(self, project_id: int) -> Project:
        """Archive a project, once."""
        project = await self.projects.one(project_id)
        project.archived_at = datetime.now(UTC)
        await self.session.flush()
        async with http_errors(self.session, unique="This project has been archived."):
            self.session.add(
                AuditEntry(project_id=project.id, action="archived", by=self.user.name)
            )
        return project
