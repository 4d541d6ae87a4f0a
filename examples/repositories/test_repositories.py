"""Tests of the repository over HTTP."""

import pytest

from examples.repositories.app import create_app
from tests.serving import serve


@pytest.mark.usefixtures("databases")
def test_what_the_repository_did_is_committed() -> None:
    """The next request sees that an author was added, renamed or removed."""
    with serve(create_app()) as served:
        author = served.client.post("/authors", json={"name": "Jane Austin"}).json()
        path = f"/authors/{author['id']}"
        renamed = served.client.put(path, json={"name": "Jane Austen"})
        assert (renamed.status_code, renamed.json()) == (200, author | {"name": "Jane Austen"})
        assert served.client.get(path).json() == renamed.json()
        assert served.client.delete(path).status_code == 204
        assert served.client.get("/authors").json() == []


@pytest.mark.usefixtures("databases")
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_a_missing_id_is_404(method: str) -> None:
    """No method succeeds on an unknown author, and nothing is written."""
    with serve(create_app()) as served:
        served.client.post("/authors", json={"name": "Jane Austen"})
        answer = served.client.request(method, "/authors/7", json={"name": "Nobody"})
        assert (answer.status_code, answer.json()) == (404, {"detail": "No such author."})
        assert served.client.get("/authors").json() == [{"id": 1, "name": "Jane Austen"}]
