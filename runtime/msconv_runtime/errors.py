"""The errors people see. Each carries a message, what to do next, and the exit code of the command line."""

from __future__ import annotations


class MsconvError(Exception):
    """Something failed in a way we understand.  `code` is stable and machine-readable."""

    code = "failed"
    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(hint)  # tracebacks in a server's log show it


class UsageError(MsconvError):
    """What was asked cannot be done: wrong flag, wrong directory, unsupported model."""

    code = "usage"
    exit_code = 2


class CheckpointError(MsconvError):
    """The source checkpoint is damaged or not what its configuration says."""

    code = "checkpoint"


class PlanError(MsconvError):
    """Tensors and family table do not agree, or a layout is impossible.  Lists every problem."""

    code = "plan"


class ArtifactError(MsconvError):
    """The artifact is unfinished, damaged, too new, or not the one that is needed."""

    code = "artifact"


class VerificationFailed(MsconvError):
    """The artifact computes something else than its source."""

    code = "verification"
    exit_code = 3


class EnvironmentProblem(MsconvError):
    """A package, version or device is missing."""

    code = "environment"
    exit_code = 4


class ResourceError(MsconvError):
    """Not enough disk or memory, or a place that cannot be written."""

    code = "resource"
    exit_code = 5


class BusyError(MsconvError):
    """Another process is working on the same directory."""

    code = "busy"
