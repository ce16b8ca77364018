"""Errors of the lower layers; reconcile.boundary alone turns them into retries, and nothing else does."""


class AttuneError(Exception):
    """The base of every error that Attune raises on purpose."""


class Unavailable(AttuneError):  # noqa: N818 (states what is the case)
    """A dependency did not answer, or answered that it can't now. Trying again later may help."""


class Conflict(AttuneError):  # noqa: N818
    """Somebody else wrote in between. Reading again and deciding anew helps at once."""


class NotOurs(AttuneError):  # noqa: N818
    """An object of a name that we need belongs to somebody else. Nothing is overwritten."""
