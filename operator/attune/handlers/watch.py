"""What kopf watches, and the key that each event wakes.

Only on.event is used: the other handlers of kopf keep their state in annotations and finalizers of users' objects.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, Final

import kopf

from attune.adapters.cluster import CUSTOM, DEPLOYMENT, HTTP_ROUTE, JOB, POD, ResourceType
from attune.reconcile.loop import Controller
from attune.reconcile.queue import Key
from attune.render.names import LABEL_KIND, LABEL_NAME, LABEL_OWNER_UID

# What the operator creates and has to hear of.
CHILDREN: Final = (JOB, POD, DEPLOYMENT, HTTP_ROUTE)


def build_registry(controller: Controller, children: Collection[ResourceType] = CHILDREN) -> kopf.OperatorRegistry:
    """Registers a handler for each kind that is watched. children: those that this cluster serves."""
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry)(_login)
    for kind, watched in CUSTOM.items():
        _register(registry, watched, functools.partial(_notice_resource, controller, kind))
    for watched in children:
        _register(registry, watched, functools.partial(_notice_child, controller))
    return registry


def build_kopf_settings(children: Collection[ResourceType] = CHILDREN) -> kopf.OperatorSettings:
    """Sets kopf up to watch and to do nothing else: no Events, no peering, no scan for later kinds."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.process.ultimate_exiting_timeout = None
    settings.watching.connect_timeout = 10
    settings.watching.server_timeout = 600
    for watched in children:
        # Other people's Jobs and pods never travel here.
        settings.watching.label_selectors[*_split(watched), watched.plural] = LABEL_OWNER_UID
    return settings


def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_via_client(**kwargs)


def _register(registry: kopf.OperatorRegistry, watched: ResourceType, notice: Callable[[Any], None]) -> None:
    # A plain function would run in kopf's thread pool; the queue belongs to the event loop.
    async def handler(body: Any, **_: Any) -> None:
        notice(body)

    group, version = _split(watched)
    kopf.on.event(group, version, watched.plural, id=f"notice-{watched.plural}", registry=registry)(handler)


def _split(watched: ResourceType) -> tuple[str, str]:
    group, _, version = watched.api_version.rpartition("/")
    return group, version


def _notice_resource(controller: Controller, kind: str, body: Any) -> None:
    metadata = body["metadata"]
    key = Key(kind, metadata["namespace"], metadata["name"])
    controller.wake(key)
    controller.wake_referrers(key)


def _notice_child(controller: Controller, body: Any) -> None:
    metadata = body["metadata"]
    labels = metadata.get("labels") or {}
    kind, name = labels.get(LABEL_KIND), labels.get(LABEL_NAME)
    if kind in CUSTOM and name:
        controller.wake(Key(kind, metadata["namespace"], name))
