"""Run by `helm test`: is the operator ready, and does the API server serve its four kinds?"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
EXPECTED = {"datasets", "finetunes", "evaluations", "canaries"}
SECONDS = 60


def main() -> int:
    """Looks until all is well or the time is up; gives the exit status."""
    deadline = time.monotonic() + SECONDS
    while (problem := find_problem()) and time.monotonic() < deadline:
        time.sleep(1)
    sys.stdout.write(f"{problem or 'the operator is ready, and its four kinds are served'}\n")
    return 1 if problem else 0


def find_problem() -> str | None:
    """Says what is not as it should be, or None."""
    ready = os.environ["READY_URL"]
    try:
        urllib.request.urlopen(ready, timeout=5).close()  # noqa: S310 (the chart's own URL)
    except OSError as error:
        return f"{ready}: {error}"
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    request = urllib.request.Request(
        f"https://{f'[{host}]' if ':' in host else host}:{port}/apis/attune.dev/v1alpha1",
        headers={"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}"},
    )
    context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    try:
        with urllib.request.urlopen(request, timeout=5, context=context) as response:  # noqa: S310 (https)
            missing = EXPECTED - {one["name"] for one in json.load(response)["resources"]}
    except urllib.error.HTTPError as error:
        return f"attune.dev/v1alpha1 is not served ({error}): install the CRDs"
    except OSError as error:
        return f"the API server does not answer: {error}"
    return f"not served: {', '.join(sorted(missing))}: install the CRDs" if missing else None


if __name__ == "__main__":
    sys.exit(main())
