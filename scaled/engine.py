"""What every inference engine has in common."""


class EngineError(RuntimeError):
    """The engine failed. Never what a user asked for: that is a ValueError, before it is loaded."""
