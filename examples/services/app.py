"""Enrolments: a seat in a course and its payment, in one transaction."""

import os
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import CheckConstraint, ForeignKey, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import ErrorRule, get_db, http_errors, install_database, transactional

Db = Annotated[AsyncSession, Depends(get_db())]
Transaction = Annotated[AsyncSession, Depends(transactional())]


class Base(DeclarativeBase): ...


class Course(Base):
    __tablename__ = "services_course"

    title: Mapped[str] = mapped_column(primary_key=True)
    seats: Mapped[int] = mapped_column(CheckConstraint("seats >= 0"))


class Student(Base):
    __tablename__ = "services_student"

    name: Mapped[str] = mapped_column(primary_key=True)
    credit: Mapped[int] = mapped_column(CheckConstraint("credit >= 0"))


class Payment(Base):
    __tablename__ = "services_payment"

    id: Mapped[int] = mapped_column(primary_key=True)
    student: Mapped[str] = mapped_column(ForeignKey(Student.name))
    amount: Mapped[int]


class Courses:
    """The service for seats. It has a transaction, whether an endpoint or a service calls it."""

    def __init__(self, session: Transaction) -> None:
        self.session = session

    async def take_seat(self, title: str) -> None:
        """Take a seat, or raise a 404 or 409."""
        course = await self.session.get(Course, title)
        if course is None:
            raise HTTPException(404, "No such course.")
        with http_errors(check=ErrorRule("The course is full.", 409)):
            course.seats = Course.seats - 1  # in the database: no lost update
            await self.session.flush()


class Payments:
    """The service for payments."""

    def __init__(self, session: Transaction) -> None:
        self.session = session

    async def charge(self, name: str, amount: int) -> Payment:
        """Book a payment, or raise a 404 or 409."""
        student = await self.session.get(Student, name)
        if student is None:
            raise HTTPException(404, "No such student.")
        self.session.add(payment := Payment(student=name, amount=amount))
        with http_errors(check=ErrorRule("Not enough credit.", 409)):
            student.credit = Student.credit - amount
            await self.session.flush()
        return payment


class Enrolments:
    """The service that owns the workflow. Its parts share the request's session."""

    def __init__(
        self,
        courses: Annotated[Courses, Depends()],
        payments: Annotated[Payments, Depends()],
    ) -> None:
        self.courses = courses
        self.payments = payments

    async def enrol(self, name: str, title: str) -> Payment:
        """Take the seat first; a refused payment rolls it back."""
        await self.courses.take_seat(title)
        return await self.payments.charge(name, amount=100)


class Enrolment(BaseModel):
    student: str
    course: str


router = APIRouter()


@router.post("/enrolments", status_code=201)
async def enrol(wanted: Enrolment, enrolments: Annotated[Enrolments, Depends()]) -> int:
    """Enrol a student: two services, one transaction."""
    return (await enrolments.enrol(wanted.student, wanted.course)).id


@router.post("/courses/{title}/guests", status_code=201)
async def invite(title: str, courses: Annotated[Courses, Depends()]) -> None:
    """Give a seat away for free: one service alone, also in a transaction."""
    await courses.take_seat(title)


@router.get("/state")
async def show(session: Db) -> dict[str, dict[str, int] | int]:
    """Show every row."""
    courses = await session.execute(select(Course.title, Course.seats))
    students = await session.execute(select(Student.name, Student.credit))
    payments = await session.scalars(select(func.count()).select_from(Payment))
    return {
        "seats": dict(courses.all()),
        "credit": dict(students.all()),
        "payments": payments.one(),
    }


async def build_engine() -> AsyncEngine:
    """Build the engine at start-up, with two courses and two students."""
    engine = create_async_engine(os.environ["DATABASE_URL"])
    async with engine.begin() as connection:  # in production: Alembic, before start-up
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(engine) as session, session.begin():
        if await session.get(Course, "chess") is None:
            session.add_all([Course(title="chess", seats=5), Course(title="go", seats=0)])
            session.add_all([Student(name="ada", credit=150), Student(name="grace", credit=20)])
    return engine


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL."""
    app = FastAPI(title="Services")
    install_database(app, engine=build_engine)
    app.include_router(router)
    return app
