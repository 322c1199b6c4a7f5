"""The two directions in which a location has a value."""

from enum import StrEnum


class PassType(StrEnum):
    """Which pass a value belongs to."""

    FORWARD = "forward"
    """The activation."""
    BACKWARD = "backward"
    """The gradient of the metric with respect to the activation."""
