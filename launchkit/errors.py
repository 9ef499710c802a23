"""Every exception launchkit raises on purpose.

::

    LaunchkitError                something launchkit could not do            exit 1
    ├── UsageError                what was typed cannot be carried out        exit 2
    │   ├── UnknownGpuError       a GPU spec that names no known device
    │   ├── UnknownModelError     a model id or path that leads nowhere
    │   ├── ModelConfigError      a config.json that describes no model
    │   ├── IllegalScenarioError  a combination that the engine refuses
    │   ├── PlanFileError         a file that is not a plan
    │   ├── ConfigFileError       a file of another tool that cannot be read
    │   └── OutputExistsError     a write that would overwrite (``--force``)
    ├── HubError                  the hub could not be read (offline, gated, absent)
    ├── MissingExtraError         an optional dependency is not installed
    ├── TraceError                a model whose step could not be traced
    ├── ProgramError              a step program that contradicts itself
    ├── OutOfMemoryError          a simulated allocation beyond the capacity
    └── LaunchError               a run that could not be started

A message is ``<fact with the value>; <what to type next>``, one line, no traceback. What is true of the
user's world rather than wrong ("nothing fits", "take care") is a value in a Plan, never an exception.
"""

from __future__ import annotations


class LaunchkitError(Exception):
    """Base of everything launchkit raises on purpose; ``exit_code`` is what the command returns."""

    exit_code = 1


class UsageError(LaunchkitError):
    """What was typed cannot be carried out as it stands."""

    exit_code = 2


class UnknownGpuError(UsageError):
    """A GPU spec that names no known device."""


class UnknownModelError(UsageError):
    """A model id or path that leads nowhere."""


class ModelConfigError(UsageError):
    """A ``config.json`` that is not JSON, or describes no model."""


class IllegalScenarioError(UsageError):
    """A combination of settings that the engine itself would refuse."""


class PlanFileError(UsageError):
    """A file that is not a launchkit plan, or one of another schema version."""


class ConfigFileError(UsageError):
    """A file of another tool that is not there, is no YAML or JSON, or has a value of the wrong type."""


class OutputExistsError(UsageError):
    """A write that would overwrite something of the user's."""


class HubError(LaunchkitError):
    """The hub could not be read: offline, gated, absent or broken."""


class MissingExtraError(LaunchkitError):
    """An optional dependency is not installed."""


class TraceError(LaunchkitError):
    """A model whose training step could not be traced."""


class ProgramError(LaunchkitError):
    """A step program that contradicts itself (a free without its allocation, an unfitted size)."""


class OutOfMemoryError(LaunchkitError):
    """A simulated allocation beyond the capacity that the allocator was given."""


class LaunchError(LaunchkitError):
    """A run that could not be started."""
