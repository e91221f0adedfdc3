"""Errors that a user can cause, as opposed to those that only a programmer can cause."""


class UserError(Exception):
    """A mistake that a user can mend. The message is one line: what, where, and what to do."""


class RankError(UserError):
    """A UserError that may strike one rank alone (a damaged file, a full disk), so that rank itself must say it."""


class OtherRankError(UserError):
    """Another rank has stopped the run and says why; this one ends in silence."""
