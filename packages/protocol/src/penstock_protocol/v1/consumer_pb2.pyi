from penstock_protocol.v1 import activation_pb2 as _activation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskOutcomeStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_OUTCOME_STATUS_UNSPECIFIED: _ClassVar[TaskOutcomeStatus]
    TASK_OUTCOME_STATUS_COMPLETE: _ClassVar[TaskOutcomeStatus]
    TASK_OUTCOME_STATUS_IGNORED: _ClassVar[TaskOutcomeStatus]
    TASK_OUTCOME_STATUS_FAILURE: _ClassVar[TaskOutcomeStatus]
    TASK_OUTCOME_STATUS_RETRY: _ClassVar[TaskOutcomeStatus]
    TASK_OUTCOME_STATUS_DEADLINE_EXCEEDED: _ClassVar[TaskOutcomeStatus]
    TASK_OUTCOME_STATUS_WORKER_DIED: _ClassVar[TaskOutcomeStatus]
    TASK_OUTCOME_STATUS_EXPIRED: _ClassVar[TaskOutcomeStatus]

class OutcomeAnswer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_ANSWER_UNSPECIFIED: _ClassVar[OutcomeAnswer]
    OUTCOME_ANSWER_APPLIED: _ClassVar[OutcomeAnswer]
    OUTCOME_ANSWER_DUPLICATE: _ClassVar[OutcomeAnswer]
    OUTCOME_ANSWER_STALE: _ClassVar[OutcomeAnswer]
    OUTCOME_ANSWER_UNKNOWN: _ClassVar[OutcomeAnswer]

class ClaimAnswer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CLAIM_ANSWER_UNSPECIFIED: _ClassVar[ClaimAnswer]
    CLAIM_ANSWER_EXTENDED: _ClassVar[ClaimAnswer]
    CLAIM_ANSWER_STALE: _ClassVar[ClaimAnswer]
    CLAIM_ANSWER_UNKNOWN: _ClassVar[ClaimAnswer]
    CLAIM_ANSWER_CANCELLED: _ClassVar[ClaimAnswer]

class ReleaseReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RELEASE_REASON_UNSPECIFIED: _ClassVar[ReleaseReason]
    RELEASE_REASON_SHUTDOWN: _ClassVar[ReleaseReason]
    RELEASE_REASON_SURPLUS: _ClassVar[ReleaseReason]
    RELEASE_REASON_UNKNOWN_TASK: _ClassVar[ReleaseReason]
    RELEASE_REASON_ARGUMENTS_MISMATCH: _ClassVar[ReleaseReason]
TASK_OUTCOME_STATUS_UNSPECIFIED: TaskOutcomeStatus
TASK_OUTCOME_STATUS_COMPLETE: TaskOutcomeStatus
TASK_OUTCOME_STATUS_IGNORED: TaskOutcomeStatus
TASK_OUTCOME_STATUS_FAILURE: TaskOutcomeStatus
TASK_OUTCOME_STATUS_RETRY: TaskOutcomeStatus
TASK_OUTCOME_STATUS_DEADLINE_EXCEEDED: TaskOutcomeStatus
TASK_OUTCOME_STATUS_WORKER_DIED: TaskOutcomeStatus
TASK_OUTCOME_STATUS_EXPIRED: TaskOutcomeStatus
OUTCOME_ANSWER_UNSPECIFIED: OutcomeAnswer
OUTCOME_ANSWER_APPLIED: OutcomeAnswer
OUTCOME_ANSWER_DUPLICATE: OutcomeAnswer
OUTCOME_ANSWER_STALE: OutcomeAnswer
OUTCOME_ANSWER_UNKNOWN: OutcomeAnswer
CLAIM_ANSWER_UNSPECIFIED: ClaimAnswer
CLAIM_ANSWER_EXTENDED: ClaimAnswer
CLAIM_ANSWER_STALE: ClaimAnswer
CLAIM_ANSWER_UNKNOWN: ClaimAnswer
CLAIM_ANSWER_CANCELLED: ClaimAnswer
RELEASE_REASON_UNSPECIFIED: ReleaseReason
RELEASE_REASON_SHUTDOWN: ReleaseReason
RELEASE_REASON_SURPLUS: ReleaseReason
RELEASE_REASON_UNKNOWN_TASK: ReleaseReason
RELEASE_REASON_ARGUMENTS_MISMATCH: ReleaseReason

class GetTaskRequest(_message.Message):
    __slots__ = ("namespace", "application")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    application: str
    def __init__(self, namespace: _Optional[str] = ..., application: _Optional[str] = ...) -> None: ...

class GetTaskResponse(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: _activation_pb2.TaskActivation
    def __init__(self, task: _Optional[_Union[_activation_pb2.TaskActivation, _Mapping]] = ...) -> None: ...

class FetchNextTask(_message.Message):
    __slots__ = ("namespace", "application")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    application: str
    def __init__(self, namespace: _Optional[str] = ..., application: _Optional[str] = ...) -> None: ...

class SetTaskStatusRequest(_message.Message):
    __slots__ = ("id", "status", "fetch_next_task", "max_attempts", "delay_on_retry")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    FETCH_NEXT_TASK_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    DELAY_ON_RETRY_FIELD_NUMBER: _ClassVar[int]
    id: str
    status: _activation_pb2.TaskActivationStatus
    fetch_next_task: FetchNextTask
    max_attempts: int
    delay_on_retry: int
    def __init__(self, id: _Optional[str] = ..., status: _Optional[_Union[_activation_pb2.TaskActivationStatus, str]] = ..., fetch_next_task: _Optional[_Union[FetchNextTask, _Mapping]] = ..., max_attempts: _Optional[int] = ..., delay_on_retry: _Optional[int] = ...) -> None: ...

class SetTaskStatusResponse(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: _activation_pb2.TaskActivation
    def __init__(self, task: _Optional[_Union[_activation_pb2.TaskActivation, _Mapping]] = ...) -> None: ...

class SetBatchActivationStatusRequest(_message.Message):
    __slots__ = ("updates",)
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[SetTaskStatusRequest]
    def __init__(self, updates: _Optional[_Iterable[_Union[SetTaskStatusRequest, _Mapping]]] = ...) -> None: ...

class SetBatchActivationStatusResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerIdentity(_message.Message):
    __slots__ = ("worker_id", "hostname", "pid", "version", "slots")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    hostname: str
    pid: int
    version: str
    slots: int
    def __init__(self, worker_id: _Optional[str] = ..., hostname: _Optional[str] = ..., pid: _Optional[int] = ..., version: _Optional[str] = ..., slots: _Optional[int] = ...) -> None: ...

class GetTasksRequest(_message.Message):
    __slots__ = ("request_id", "application", "namespaces", "max_tasks", "wait_ms", "worker")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    MAX_TASKS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    application: str
    namespaces: _containers.RepeatedScalarFieldContainer[str]
    max_tasks: int
    wait_ms: int
    worker: WorkerIdentity
    def __init__(self, request_id: _Optional[str] = ..., application: _Optional[str] = ..., namespaces: _Optional[_Iterable[str]] = ..., max_tasks: _Optional[int] = ..., wait_ms: _Optional[int] = ..., worker: _Optional[_Union[WorkerIdentity, _Mapping]] = ...) -> None: ...

class ClaimedTask(_message.Message):
    __slots__ = ("activation", "claim_token", "deadline_ms", "expires_in_ms", "attempt")
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    CLAIM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    activation: _activation_pb2.TaskActivation
    claim_token: bytes
    deadline_ms: int
    expires_in_ms: int
    attempt: int
    def __init__(self, activation: _Optional[_Union[_activation_pb2.TaskActivation, _Mapping]] = ..., claim_token: _Optional[bytes] = ..., deadline_ms: _Optional[int] = ..., expires_in_ms: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class PendingCount(_message.Message):
    __slots__ = ("application", "namespace", "pending")
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    application: str
    namespace: str
    pending: int
    def __init__(self, application: _Optional[str] = ..., namespace: _Optional[str] = ..., pending: _Optional[int] = ...) -> None: ...

class GetTasksResponse(_message.Message):
    __slots__ = ("tasks", "pending", "lease_ms")
    TASKS_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[ClaimedTask]
    pending: _containers.RepeatedCompositeFieldContainer[PendingCount]
    lease_ms: int
    def __init__(self, tasks: _Optional[_Iterable[_Union[ClaimedTask, _Mapping]]] = ..., pending: _Optional[_Iterable[_Union[PendingCount, _Mapping]]] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class ErrorSummary(_message.Message):
    __slots__ = ("type", "message", "traceback")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    type: str
    message: str
    traceback: str
    def __init__(self, type: _Optional[str] = ..., message: _Optional[str] = ..., traceback: _Optional[str] = ...) -> None: ...

class TaskOutcome(_message.Message):
    __slots__ = ("claim_token", "status", "error", "retry_delay_ms")
    CLAIM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RETRY_DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    claim_token: bytes
    status: TaskOutcomeStatus
    error: ErrorSummary
    retry_delay_ms: int
    def __init__(self, claim_token: _Optional[bytes] = ..., status: _Optional[_Union[TaskOutcomeStatus, str]] = ..., error: _Optional[_Union[ErrorSummary, _Mapping]] = ..., retry_delay_ms: _Optional[int] = ...) -> None: ...

class SetTaskStatusesRequest(_message.Message):
    __slots__ = ("outcomes", "worker_id")
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[TaskOutcome]
    worker_id: str
    def __init__(self, outcomes: _Optional[_Iterable[_Union[TaskOutcome, _Mapping]]] = ..., worker_id: _Optional[str] = ...) -> None: ...

class SetTaskStatusesResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedScalarFieldContainer[OutcomeAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[OutcomeAnswer, str]]] = ...) -> None: ...

class HeldClaim(_message.Message):
    __slots__ = ("claim_token", "started")
    CLAIM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    claim_token: bytes
    started: bool
    def __init__(self, claim_token: _Optional[bytes] = ..., started: bool = ...) -> None: ...

class ExtendClaimsRequest(_message.Message):
    __slots__ = ("claims", "worker_id")
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    claims: _containers.RepeatedCompositeFieldContainer[HeldClaim]
    worker_id: str
    def __init__(self, claims: _Optional[_Iterable[_Union[HeldClaim, _Mapping]]] = ..., worker_id: _Optional[str] = ...) -> None: ...

class ExtendClaimsResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedScalarFieldContainer[ClaimAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[ClaimAnswer, str]]] = ...) -> None: ...

class ReleasedTask(_message.Message):
    __slots__ = ("claim_token", "reason", "detail")
    CLAIM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    claim_token: bytes
    reason: ReleaseReason
    detail: str
    def __init__(self, claim_token: _Optional[bytes] = ..., reason: _Optional[_Union[ReleaseReason, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class ReleaseTasksRequest(_message.Message):
    __slots__ = ("tasks", "worker_id")
    TASKS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[ReleasedTask]
    worker_id: str
    def __init__(self, tasks: _Optional[_Iterable[_Union[ReleasedTask, _Mapping]]] = ..., worker_id: _Optional[str] = ...) -> None: ...

class ReleaseTasksResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedScalarFieldContainer[OutcomeAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[OutcomeAnswer, str]]] = ...) -> None: ...
