"""Declare tasks and send them."""

from __future__ import annotations

from penstock_client.app import App, Namespace
from penstock_client.context import TaskContext, current_task
from penstock_client.errors import (
    AppError,
    ArgumentsMismatch,
    BufferFull,
    ConfigError,
    RetryRequested,
    SendError,
)
from penstock_client.instrumented import instrumented_task, retry
from penstock_client.retry import Backoff, Exponential, Fixed, Retry, Verdict
from penstock_client.task import Call, Task, TaskRef
from penstock_client.transports.memory import MemoryTransport
from penstock_protocol.payload import PayloadError

__version__ = "0.1.0"

__all__ = [
    "App",
    "AppError",
    "ArgumentsMismatch",
    "Backoff",
    "BufferFull",
    "Call",
    "ConfigError",
    "Exponential",
    "Fixed",
    "MemoryTransport",
    "Namespace",
    "PayloadError",
    "Retry",
    "RetryRequested",
    "SendError",
    "Task",
    "TaskContext",
    "TaskRef",
    "Verdict",
    "current_task",
    "instrumented_task",
    "retry",
]
