"""Errors of the lower layers; reconcile.boundary alone turns them into retries, and nothing else does."""


class AttuneError(Exception):
    """The base of every error that Attune raises on purpose."""


class Unavailable(AttuneError):  # noqa: N818 (states what is the case)
    """A dependency did not answer, or answered that it can't now. Trying again later may help."""


class Conflict(AttuneError):  # noqa: N818
    """Somebody else wrote in between. Reading again and deciding anew helps at once."""


class AlreadyExists(AttuneError):  # noqa: N818
    """An object of this name is there already."""


class NotOurs(AttuneError):  # noqa: N818
    """An object of a name that we need belongs to somebody else. Nothing is overwritten."""


class Refused(AttuneError):  # noqa: N818
    """The API server refuses the request as it is: forbidden, over quota, or invalid. Its message says why."""


class NotServed(AttuneError):  # noqa: N818
    """The cluster does not serve this kind of object: its CRD is not installed."""


class NotLeader(AttuneError):  # noqa: N818
    """This process may no longer write: its Lease has run out."""
