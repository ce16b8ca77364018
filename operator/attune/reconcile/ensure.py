"""Creates children that never change once they are there."""

from attune.adapters.cluster import Cluster, Object, is_owned_by, type_of
from attune.contract.job import Owner
from attune.errors import AlreadyExists, Conflict, NotOurs


def ensure_created(cluster: Cluster, owner: Owner, obj: Object) -> Object | None:
    """Creates an object that never changes; gives None when it was created, or the one that is already there.

    Raises:
        NotOurs: when the one that is there has another owner.
        Conflict: when it vanished in between.
    """
    try:
        cluster.create(obj)
    except AlreadyExists:
        metadata = obj["metadata"]
        present = cluster.get(type_of(obj), metadata["namespace"], metadata["name"])
        if present is None:
            raise Conflict(f"{obj['kind']} {metadata['name']} has just gone") from None
        if not is_owned_by(present, owner.uid):
            raise NotOurs(
                f"{obj['kind']} {metadata['name']} exists and is not owned by {owner.kind} {owner.name}; "
                "delete or rename it"
            ) from None
        return present
    return None
