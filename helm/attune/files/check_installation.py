"""Run by `helm test`: is the operator ready, and does the API server serve its four kinds?"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
EXPECTED = {"datasets", "finetunes", "evaluations", "canaries"}
DEADLINE = time.monotonic() + 60


def main():
    problem = find_problem()
    while problem and time.monotonic() < DEADLINE:
        time.sleep(1)
        problem = find_problem()
    if problem:
        sys.exit(problem)
    print("the operator is ready, and its four kinds are served")


def find_problem():
    try:
        with urllib.request.urlopen(os.environ["READY_URL"], timeout=5):
            pass
    except OSError as error:
        return f"{os.environ['READY_URL']}: {error}"
    with open(f"{ACCOUNT}/token", encoding="utf-8") as file:
        token = file.read()
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    if ":" in host:
        host = f"[{host}]"
    request = urllib.request.Request(
        f"https://{host}:{port}/apis/attune.dev/v1alpha1", headers={"Authorization": f"Bearer {token}"}
    )
    context = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
    try:
        with urllib.request.urlopen(request, timeout=5, context=context) as response:
            served = {one["name"] for one in json.load(response)["resources"]}
    except urllib.error.HTTPError as error:
        return f"attune.dev/v1alpha1 is not served ({error}): install the CRDs"
    except OSError as error:
        return f"the API server does not answer: {error}"
    missing = EXPECTED - served
    return f"not served: {', '.join(sorted(missing))}: install the CRDs" if missing else None


main()
