"""Settings come from the environment, and a wrong one is said before anything begins."""

import pytest
from attune.settings import Settings, SettingsError

IMAGES = {"ATTUNE_TRAINER_IMAGE": "t:1", "ATTUNE_INFERENCE_IMAGE": "i:1"}


def test_defaults_need_only_the_images() -> None:
    settings = Settings.from_environment({**IMAGES, "POD_NAME": "attune-1", "POD_NAMESPACE": "attune-system"})
    assert settings.identity == "attune-1"
    assert settings.lease_namespace == "attune-system"
    assert settings.watch_namespaces == ()


def test_lists_are_separated_by_commas_and_empty_values_count_as_absent() -> None:
    settings = Settings.from_environment({**IMAGES, "ATTUNE_WATCH_NAMESPACES": "a, b,", "ATTUNE_LEASE_NAME": ""})
    assert settings.watch_namespaces == ("a", "b")
    assert settings.lease_name == "attune-operator"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"ATTUNE_RESYNC_SECONDS": "soon"}, "ATTUNE_RESYNC_SECONDS"),
        ({"ATTUNE_RESYNC_SECONDS": "0"}, "ATTUNE_RESYNC_SECONDS"),
        ({"ATTUNE_STORE": "x"}, "ATTUNE_STORE is not a setting"),
        ({"ATTUNE_TRAINER_IMAGE": ""}, "ATTUNE_TRAINER_IMAGE: must be set"),
        ({"ATTUNE_WATCH_NAMESPACES": "UPPER"}, "ATTUNE_WATCH_NAMESPACES"),
        ({"ATTUNE_PROMETHEUS_HOSTS": "http://prometheus:9090"}, "ATTUNE_PROMETHEUS_HOSTS"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        Settings.from_environment({**IMAGES, **wrong})


def test_what_kubernetes_sets_for_a_service_is_no_setting() -> None:
    links = {
        "ATTUNE_SERVICE_HOST": "10.0.0.1",
        "ATTUNE_OPERATOR_SERVICE_PORT_HTTP": "8080",
        "ATTUNE_PORT_8080_TCP_ADDR": "10.0.0.1",
        "ATTUNE_METRICS_PORT": "tcp://10.0.0.1:8080",
    }
    assert Settings.from_environment({**IMAGES, **links}).trainer_image == "t:1"
