"""Each mistake that a person can make shows as a condition with a reason and what to change."""

from dataclasses import dataclass

import pytest

from devcluster import client

pytestmark = [pytest.mark.node, pytest.mark.timeout(900)]

HEAD = "apiVersion: attune.dev/v1alpha1\n"


@dataclass(frozen=True)
class Mistake:
    kind: str
    name: str
    spec: str
    reason: str
    says: str

    def manifest(self) -> str:
        return f"{HEAD}kind: {self.kind}\nmetadata: {{name: {self.name}}}\nspec: {{{self.spec}}}\n"


def dataset(name: str, source: str, reason: str, says: str, more: str = "") -> Mistake:
    return Mistake("Dataset", name, f"language: en, sources: [{{{source}}}]{more}", reason, says)


MISTAKES = (
    dataset("no-bucket", 's3: {uri: "s3://no-such-bucket/a/"}, format: Directory', "BucketNotFound", "no-such-bucket"),
    dataset("empty", 's3: {uri: "s3://attune/nothing/here/"}, format: Directory', "SourceEmpty", "nothing/here"),
    dataset(
        "no-manifest",
        's3: {uri: "s3://attune/e2e/new-voices/"}, format: Manifest, manifest: absent.jsonl',
        "ManifestNotFound",
        "absent.jsonl",
    ),
    dataset(
        "too-small",
        's3: {uri: "s3://attune/e2e/tiny/"}, format: Manifest, manifest: t.jsonl',
        "TooSmallToSplit",
        "add recordings of more speakers",
    ),
    dataset(
        "bad-lines", 's3: {uri: "s3://attune/e2e/bad/"}, format: Manifest, manifest: t.jsonl', "TooManyRejected", "3"
    ),
    dataset(
        "wrong-keys",
        's3: {uri: "s3://attune/e2e/new-voices/", credentialsSecretRef: {name: wrong-keys}}, '
        "format: Manifest, manifest: transcripts.jsonl",
        "WrongCredentials",
        "correct the Secret",
    ),
    Mistake(
        "FineTune",
        "failed-data",
        'baseModel: {uri: "s3://attune/e2e/mini"}, datasets: [{name: empty}]',
        "DatasetFailed",
        "empty",
    ),
)


def terminal(resource: client.Resource) -> client.Resource:
    return client.condition(resource, "Ready") or client.condition(resource, "Succeeded")


def test_wrong_input_says_what_to_change(namespace: str) -> None:
    from attune_trainer.store import Store  # noqa: PLC0415

    with client.store_on_loopback(namespace):
        store = Store.from_environment()
        store.write_bytes("e2e/tiny/a.wav", store.read_bytes("e2e/new-voices/audio/0000.wav"))
        store.write_bytes("e2e/tiny/t.jsonl", b'{"audio": "a.wav", "text": "one two", "speaker": "one"}\n')
        store.write_bytes("e2e/bad/t.jsonl", b'not json\n{"audio": "a.wav"}\n{"audio": "a.wav", "text": "hello"}\n')
    client.kubectl(
        "create", "secret", "generic", "wrong-keys", "-n", namespace,
        "--from-literal=endpoint=http://s3.storage.svc.cluster.local:9000", "--from-literal=accessKey=attune",
        "--from-literal=secretKey=wrong", "--from-literal=region=us-east-1",
    )  # fmt: skip
    for mistake in MISTAKES:
        client.kubectl("apply", "-n", namespace, "-f", "-", text=mistake.manifest())
    for mistake in MISTAKES:
        found = client.wait(
            mistake.kind,
            mistake.name,
            namespace,
            until=lambda resource, wanted=mistake.reason: terminal(resource).get("reason") == wanted,  # type: ignore[misc]
            describe=client.explain,
            seconds=240,
        )
        assert terminal(found)["status"] == "False"
        assert mistake.says in terminal(found)["message"], terminal(found)
        events = client.kubectl(
            "get", "events", "-n", namespace, "-o", "jsonpath={.items[*].reason}",
            "--field-selector", f"involvedObject.name={mistake.name},involvedObject.kind={mistake.kind}",
        )  # fmt: skip
        assert mistake.reason in events.split()


def test_secret_that_comes_late_is_waited_for(namespace: str) -> None:
    source = (
        's3: {uri: "s3://attune/e2e/new-voices/", credentialsSecretRef: {name: late}}, '
        "format: Manifest, manifest: transcripts.jsonl"
    )
    client.kubectl("apply", "-n", namespace, "-f", "-", text=dataset("late", source, "", "").manifest())
    waiting = client.wait(
        "Dataset",
        "late",
        namespace,
        until=lambda resource: terminal(resource).get("reason") == "SecretNotFound",
        describe=client.explain,
        seconds=120,
    )
    assert "late" in terminal(waiting)["message"]
    client.kubectl(
        "create", "secret", "generic", "late", "-n", namespace,
        "--from-literal=endpoint=http://s3.storage.svc.cluster.local:9000", "--from-literal=accessKey=attune",
        "--from-literal=secretKey=attune-example-only", "--from-literal=region=us-east-1",
    )  # fmt: skip
    client.wait(
        "Dataset",
        "late",
        namespace,
        until=lambda resource: terminal(resource).get("status") == "True",
        describe=client.explain,
        seconds=240,
    )
