"""Checks of values, whose errors name the field, its value and what works."""


def require(holds: bool, field: str, value: object, works: str) -> None:
    """Raise ValueError, "field=value does not work: field must be ...", unless it holds."""
    if not holds:
        raise ValueError(f"{field}={value!r} does not work: {field} must be {works}")
