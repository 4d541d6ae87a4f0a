"""Projects of the request's tenant. No query here names one."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, HTTPException
from sqlalchemy import select

from examples.tenants_by_predicate.dependencies import CurrentUser, TenantDb, Transaction
from examples.tenants_by_predicate.models import AuditEntry, Project
from fastapi_sqlnative import http_errors


class Projects:
    """Find and keep projects: a repository, which joins whatever the request does."""

    def __init__(self, session: TenantDb) -> None:
        self.session = session

    async def all(self) -> Sequence[Project]:
        """List the projects that there are, for this tenant."""
        return (await self.session.scalars(select(Project).order_by(Project.id))).all()

    async def one(self, project_id: int) -> Project:
        """Find a project; a foreign one is as good as none."""
        project = await self.session.get(Project, project_id)
        if project is None:
            raise HTTPException(404, "No such project.")
        return project

    async def add(self, project: Project) -> Project:
        """Keep a project. Its name is taken only by one of the same tenant."""
        async with http_errors(self.session, unique="There is a project of this name."):
            self.session.add(project)
        return project


class Archive:
    """Archive a project and say so in the audit: both, or neither."""

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
