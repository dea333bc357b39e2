"""The errors that genai_perf raises on purpose, beside ValueError and TypeError."""


class BackendUnsupported(NotImplementedError):
    """A backend that the caller named cannot run this call; the message is its reason."""


class CheckpointError(ValueError):
    """A checkpoint on disk cannot be read or written, or is damaged; names the file or tensor."""


class CalibrationError(ValueError):
    """Calibration data is missing, too short, not text, or gave a Hessian that cannot be used."""
