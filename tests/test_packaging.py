"""The parts of a release that can be tested before it is built. `release-check` tests the rest."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load(path.read_text("utf-8"))
    return loaded


def make(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_release_notes_are_the_changelogs() -> None:
    """Release notes are the version's section of the changelog, and cannot be made without it."""
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$", changelog, re.MULTILINE)
    assert len(headings) == changelog.count("\n## ")
    for heading in headings:
        notes = make("release-notes", f"VERSION={heading}").stdout
        assert notes.strip()
        assert notes in changelog
        assert "\n## " not in notes
    assert make("release-notes", "VERSION=0.0.0").returncode != 0


def test_links_of_the_readme_become_absolute() -> None:
    """In the README on PyPI, links to files lead to this release's tag."""
    (rule,) = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    replacement = re.sub(r"\$HFPR_VERSION", "1.2.3", rule["replacement"])
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = re.sub(rule["pattern"], replacement, readme)
    source = PROJECT["project"]["urls"]["Source"]
    assert f"]({source}/blob/v1.2.3/docs/index.md)" in shown
    assert not re.findall(r"\]\((?!https://)[^)]+\)", shown)


def test_supported_pythons_are_said_and_tried() -> None:
    """CI runs the tests on every minor version of Python that the classifiers name."""
    said = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["project"]["classifiers"]))
    jobs = read(GITHUB / "workflows" / "ci.yml")["jobs"]
    (first,) = (
        step["with"]["python-version"]
        for step in jobs["check"]["steps"]
        if "with" in step and "python-version" in step["with"]
    )
    assert said == [first, *jobs["python"]["strategy"]["matrix"]["python"]]
    assert PROJECT["project"]["requires-python"] == f">={first}"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_there_is(workflow: Path) -> None:
    """A workflow runs targets of the Makefile, with read-only permissions and no secrets."""
    content, loaded = workflow.read_text("utf-8"), read(workflow)
    runs = [
        step["run"] for job in loaded["jobs"].values() for step in job["steps"] if "run" in step
    ]
    targets = re.findall(r"\bmake ([a-z-]+)", "\n".join(runs))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert targets
    assert all(f"\n{target}: " in makefile for target in targets)
    assert loaded["permissions"] == {"contents": "read"}
    assert "secrets." not in content
    for job in loaded["jobs"].values():
        assert job["timeout-minutes"]
        assert all(
            "@v" in step["uses"] or "@release/" in step["uses"]
            for step in job["steps"]
            if "uses" in step
        )


def test_a_release_is_published_without_a_token() -> None:
    """PyPI trusts the workflow itself, and the packages are attested where they are built."""
    jobs = read(GITHUB / "workflows" / "release.yml")["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["environment"] == "pypi"
    assert jobs["publish"]["needs"] == "build"
    assert jobs["build"]["permissions"]["attestations"] == "write"
    assert not [step for step in jobs["publish"]["steps"] if "run" in step]  # no commands of ours


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_forms(form: Path) -> None:
    """An issue form requires an answer, and its fields have labels and unique names."""
    loaded = read(form)
    if form.stem == "config":
        assert loaded["contact_links"]
        return
    assert {"name", "description", "body"} <= loaded.keys()
    asked = [each for each in loaded["body"] if each["type"] != "markdown"]
    assert any(each["validations"]["required"] for each in asked if "validations" in each)
    names = [each["id"] for each in asked]
    assert len(set(names)) == len(names)
    assert all(each["attributes"]["label"] for each in asked)
