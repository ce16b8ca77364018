"""What answers of an API server, and of proxies before it, come to."""

from collections.abc import Callable, Iterator

import pytest
from attune.adapters.cluster import JOB, Cluster
from attune.errors import AlreadyExists, AttuneError, Conflict, Refused, Unavailable
from kubernetes.client import ApiClient, Configuration

from tests.reconcile.canary_stage import serve

Answer = tuple[int, str, str]


@pytest.fixture
def ask() -> Iterator[Callable[[Answer], object]]:
    """Reads a Job from a server that gives one answer; its shape is the point."""
    answers: list[Answer] = []
    server, port = serve(lambda _: answers[-1])
    configuration = Configuration()
    configuration.host = f"http://127.0.0.1:{port}"
    cluster = Cluster(ApiClient(configuration), request_seconds=5)

    def read(answer: Answer) -> object:
        answers.append(answer)
        return cluster.get(JOB, "team", "calls")

    yield read
    cluster.close()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        pytest.param(401, "{}", Unavailable, id="a token that has just been replaced"),
        pytest.param(403, '{"message": "quota"}', Refused, id="forbidden"),
        pytest.param(409, '{"reason": "AlreadyExists"}', AlreadyExists, id="there already"),
        pytest.param(409, '{"reason": "Conflict"}', Conflict, id="changed in between"),
        pytest.param(410, '{"reason": "Expired"}', Unavailable, id="a list that has to be read from the start"),
        pytest.param(422, '{"message": "invalid"}', Refused, id="invalid"),
        pytest.param(429, "{}", Unavailable, id="too many requests"),
        pytest.param(500, "", Unavailable, id="an error of the server's"),
        pytest.param(520, "<html>", Unavailable, id="a status that only a proxy knows"),
    ],
)
def test_each_status_is_an_error_of_ours(
    ask: Callable[[Answer], object], status: int, body: str, error: type[AttuneError]
) -> None:
    with pytest.raises(error):
        ask((status, "application/json", body))


def test_what_is_not_there_is_none(ask: Callable[[Answer], object]) -> None:
    assert ask((404, "text/plain", "404 page not found")) is None
