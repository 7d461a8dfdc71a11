from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_STATE_UNSPECIFIED: _ClassVar[TaskState]
    TASK_STATE_PENDING: _ClassVar[TaskState]
    TASK_STATE_DELAYED: _ClassVar[TaskState]
    TASK_STATE_PROCESSING: _ClassVar[TaskState]
    TASK_STATE_FORWARDING: _ClassVar[TaskState]

class RetryResult(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RETRY_RESULT_UNSPECIFIED: _ClassVar[RetryResult]
    RETRY_RESULT_PENDING_NOW: _ClassVar[RetryResult]
    RETRY_RESULT_NOT_DELAYED: _ClassVar[RetryResult]
    RETRY_RESULT_FORWARDING: _ClassVar[RetryResult]
    RETRY_RESULT_DEAD_LETTER: _ClassVar[RetryResult]
    RETRY_RESULT_FINISHED: _ClassVar[RetryResult]
    RETRY_RESULT_UNKNOWN: _ClassVar[RetryResult]

class CancelResult(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CANCEL_RESULT_UNSPECIFIED: _ClassVar[CancelResult]
    CANCEL_RESULT_CANCELLED: _ClassVar[CancelResult]
    CANCEL_RESULT_KILLED: _ClassVar[CancelResult]
    CANCEL_RESULT_FORWARDING: _ClassVar[CancelResult]
    CANCEL_RESULT_FINISHED: _ClassVar[CancelResult]
    CANCEL_RESULT_UNKNOWN: _ClassVar[CancelResult]
    CANCEL_RESULT_ANOTHER_BROKERS: _ClassVar[CancelResult]

class ReplayResult(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLAY_RESULT_UNSPECIFIED: _ClassVar[ReplayResult]
    REPLAY_RESULT_SENT: _ClassVar[ReplayResult]
    REPLAY_RESULT_UNKNOWN: _ClassVar[ReplayResult]
    REPLAY_RESULT_NOT_AN_ACTIVATION: _ClassVar[ReplayResult]
TASK_STATE_UNSPECIFIED: TaskState
TASK_STATE_PENDING: TaskState
TASK_STATE_DELAYED: TaskState
TASK_STATE_PROCESSING: TaskState
TASK_STATE_FORWARDING: TaskState
RETRY_RESULT_UNSPECIFIED: RetryResult
RETRY_RESULT_PENDING_NOW: RetryResult
RETRY_RESULT_NOT_DELAYED: RetryResult
RETRY_RESULT_FORWARDING: RetryResult
RETRY_RESULT_DEAD_LETTER: RetryResult
RETRY_RESULT_FINISHED: RetryResult
RETRY_RESULT_UNKNOWN: RetryResult
CANCEL_RESULT_UNSPECIFIED: CancelResult
CANCEL_RESULT_CANCELLED: CancelResult
CANCEL_RESULT_KILLED: CancelResult
CANCEL_RESULT_FORWARDING: CancelResult
CANCEL_RESULT_FINISHED: CancelResult
CANCEL_RESULT_UNKNOWN: CancelResult
CANCEL_RESULT_ANOTHER_BROKERS: CancelResult
REPLAY_RESULT_UNSPECIFIED: ReplayResult
REPLAY_RESULT_SENT: ReplayResult
REPLAY_RESULT_UNKNOWN: ReplayResult
REPLAY_RESULT_NOT_AN_ACTIVATION: ReplayResult

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StateCount(_message.Message):
    __slots__ = ("state", "tasks")
    STATE_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    state: str
    tasks: int
    def __init__(self, state: _Optional[str] = ..., tasks: _Optional[int] = ...) -> None: ...

class BooksTerm(_message.Message):
    __slots__ = ("term", "tasks")
    TERM_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    term: str
    tasks: int
    def __init__(self, term: _Optional[str] = ..., tasks: _Optional[int] = ...) -> None: ...

class PartitionStatus(_message.Message):
    __slots__ = ("partition", "lag")
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    partition: int
    lag: int
    def __init__(self, partition: _Optional[int] = ..., lag: _Optional[int] = ...) -> None: ...

class KafkaStatus(_message.Message):
    __slots__ = ("address", "topic", "consumer_group", "deadletter_topic", "connected", "partitions", "commit_age_seconds")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_GROUP_FIELD_NUMBER: _ClassVar[int]
    DEADLETTER_TOPIC_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    address: str
    topic: str
    consumer_group: str
    deadletter_topic: str
    connected: bool
    partitions: _containers.RepeatedCompositeFieldContainer[PartitionStatus]
    commit_age_seconds: float
    def __init__(self, address: _Optional[str] = ..., topic: _Optional[str] = ..., consumer_group: _Optional[str] = ..., deadletter_topic: _Optional[str] = ..., connected: bool = ..., partitions: _Optional[_Iterable[_Union[PartitionStatus, _Mapping]]] = ..., commit_age_seconds: _Optional[float] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("broker_id", "version", "store_id", "epoch", "uptime_seconds", "healthy", "intake_state", "intake_reason", "states", "rows", "rows_max", "bytes", "bytes_max", "oldest_pending_seconds", "accepted", "ended", "books_difference", "dead_letters_resting", "forward_alarm", "waiting_requests", "workers", "paused_namespaces", "unclaimable", "database_bytes", "wal_bytes", "disk_free_bytes", "kafka")
    BROKER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    INTAKE_STATE_FIELD_NUMBER: _ClassVar[int]
    INTAKE_REASON_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROWS_MAX_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    OLDEST_PENDING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    BOOKS_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    DEAD_LETTERS_RESTING_FIELD_NUMBER: _ClassVar[int]
    FORWARD_ALARM_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    PAUSED_NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    UNCLAIMABLE_FIELD_NUMBER: _ClassVar[int]
    DATABASE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KAFKA_FIELD_NUMBER: _ClassVar[int]
    broker_id: str
    version: str
    store_id: str
    epoch: int
    uptime_seconds: float
    healthy: bool
    intake_state: str
    intake_reason: str
    states: _containers.RepeatedCompositeFieldContainer[StateCount]
    rows: int
    rows_max: int
    bytes: int
    bytes_max: int
    oldest_pending_seconds: float
    accepted: int
    ended: int
    books_difference: int
    dead_letters_resting: int
    forward_alarm: str
    waiting_requests: int
    workers: int
    paused_namespaces: int
    unclaimable: int
    database_bytes: int
    wal_bytes: int
    disk_free_bytes: int
    kafka: KafkaStatus
    def __init__(self, broker_id: _Optional[str] = ..., version: _Optional[str] = ..., store_id: _Optional[str] = ..., epoch: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., healthy: bool = ..., intake_state: _Optional[str] = ..., intake_reason: _Optional[str] = ..., states: _Optional[_Iterable[_Union[StateCount, _Mapping]]] = ..., rows: _Optional[int] = ..., rows_max: _Optional[int] = ..., bytes: _Optional[int] = ..., bytes_max: _Optional[int] = ..., oldest_pending_seconds: _Optional[float] = ..., accepted: _Optional[int] = ..., ended: _Optional[int] = ..., books_difference: _Optional[int] = ..., dead_letters_resting: _Optional[int] = ..., forward_alarm: _Optional[str] = ..., waiting_requests: _Optional[int] = ..., workers: _Optional[int] = ..., paused_namespaces: _Optional[int] = ..., unclaimable: _Optional[int] = ..., database_bytes: _Optional[int] = ..., wal_bytes: _Optional[int] = ..., disk_free_bytes: _Optional[int] = ..., kafka: _Optional[_Union[KafkaStatus, _Mapping]] = ...) -> None: ...

class TaskFilter(_message.Message):
    __slots__ = ("application", "namespace", "taskname", "state")
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TASKNAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    application: str
    namespace: str
    taskname: str
    state: TaskState
    def __init__(self, application: _Optional[str] = ..., namespace: _Optional[str] = ..., taskname: _Optional[str] = ..., state: _Optional[_Union[TaskState, str]] = ...) -> None: ...

class HeldTask(_message.Message):
    __slots__ = ("seq", "id", "application", "namespace", "taskname", "state", "attempts", "max_attempts", "deliveries_lost", "at_most_once", "received_at", "ready_at", "expires_at", "deadline_ms", "bytes", "topic", "partition", "offset", "reason", "error", "worker_id", "started_at")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TASKNAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    DELIVERIES_LOST_FIELD_NUMBER: _ClassVar[int]
    AT_MOST_ONCE_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_AT_FIELD_NUMBER: _ClassVar[int]
    READY_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    seq: int
    id: str
    application: str
    namespace: str
    taskname: str
    state: TaskState
    attempts: int
    max_attempts: int
    deliveries_lost: int
    at_most_once: bool
    received_at: int
    ready_at: int
    expires_at: int
    deadline_ms: int
    bytes: int
    topic: str
    partition: int
    offset: int
    reason: str
    error: str
    worker_id: str
    started_at: int
    def __init__(self, seq: _Optional[int] = ..., id: _Optional[str] = ..., application: _Optional[str] = ..., namespace: _Optional[str] = ..., taskname: _Optional[str] = ..., state: _Optional[_Union[TaskState, str]] = ..., attempts: _Optional[int] = ..., max_attempts: _Optional[int] = ..., deliveries_lost: _Optional[int] = ..., at_most_once: bool = ..., received_at: _Optional[int] = ..., ready_at: _Optional[int] = ..., expires_at: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., bytes: _Optional[int] = ..., topic: _Optional[str] = ..., partition: _Optional[int] = ..., offset: _Optional[int] = ..., reason: _Optional[str] = ..., error: _Optional[str] = ..., worker_id: _Optional[str] = ..., started_at: _Optional[int] = ...) -> None: ...

class ListTasksRequest(_message.Message):
    __slots__ = ("filter", "after_seq", "limit")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQ_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    filter: TaskFilter
    after_seq: int
    limit: int
    def __init__(self, filter: _Optional[_Union[TaskFilter, _Mapping]] = ..., after_seq: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListTasksResponse(_message.Message):
    __slots__ = ("tasks", "next_after_seq")
    TASKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_AFTER_SEQ_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[HeldTask]
    next_after_seq: int
    def __init__(self, tasks: _Optional[_Iterable[_Union[HeldTask, _Mapping]]] = ..., next_after_seq: _Optional[int] = ...) -> None: ...

class AdminServiceGetTaskRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class AdminServiceGetTaskResponse(_message.Message):
    __slots__ = ("task", "activation")
    TASK_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    task: HeldTask
    activation: bytes
    def __init__(self, task: _Optional[_Union[HeldTask, _Mapping]] = ..., activation: _Optional[bytes] = ...) -> None: ...

class ExplainTaskRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("code", "text")
    CODE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    code: str
    text: str
    def __init__(self, code: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class ExplainTaskResponse(_message.Message):
    __slots__ = ("task", "known", "state", "findings", "runs_at", "ahead", "ahead_max")
    TASK_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    RUNS_AT_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    AHEAD_MAX_FIELD_NUMBER: _ClassVar[int]
    task: HeldTask
    known: bool
    state: str
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    runs_at: int
    ahead: int
    ahead_max: int
    def __init__(self, task: _Optional[_Union[HeldTask, _Mapping]] = ..., known: bool = ..., state: _Optional[str] = ..., findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ..., runs_at: _Optional[int] = ..., ahead: _Optional[int] = ..., ahead_max: _Optional[int] = ...) -> None: ...

class RetryTasksRequest(_message.Message):
    __slots__ = ("ids", "by")
    IDS_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    by: str
    def __init__(self, ids: _Optional[_Iterable[str]] = ..., by: _Optional[str] = ...) -> None: ...

class RetryTasksResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedScalarFieldContainer[RetryResult]
    def __init__(self, results: _Optional[_Iterable[_Union[RetryResult, str]]] = ...) -> None: ...

class CancelTasksRequest(_message.Message):
    __slots__ = ("ids", "by")
    IDS_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    by: str
    def __init__(self, ids: _Optional[_Iterable[str]] = ..., by: _Optional[str] = ...) -> None: ...

class CancelTasksResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedScalarFieldContainer[CancelResult]
    def __init__(self, results: _Optional[_Iterable[_Union[CancelResult, str]]] = ...) -> None: ...

class NamespaceStatus(_message.Message):
    __slots__ = ("application", "namespace", "pending", "delayed", "processing", "forwarding", "oldest_pending_seconds", "paused_at", "unasked_seconds", "books", "books_difference")
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    DELAYED_FIELD_NUMBER: _ClassVar[int]
    PROCESSING_FIELD_NUMBER: _ClassVar[int]
    FORWARDING_FIELD_NUMBER: _ClassVar[int]
    OLDEST_PENDING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PAUSED_AT_FIELD_NUMBER: _ClassVar[int]
    UNASKED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BOOKS_FIELD_NUMBER: _ClassVar[int]
    BOOKS_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    application: str
    namespace: str
    pending: int
    delayed: int
    processing: int
    forwarding: int
    oldest_pending_seconds: float
    paused_at: int
    unasked_seconds: float
    books: _containers.RepeatedCompositeFieldContainer[BooksTerm]
    books_difference: int
    def __init__(self, application: _Optional[str] = ..., namespace: _Optional[str] = ..., pending: _Optional[int] = ..., delayed: _Optional[int] = ..., processing: _Optional[int] = ..., forwarding: _Optional[int] = ..., oldest_pending_seconds: _Optional[float] = ..., paused_at: _Optional[int] = ..., unasked_seconds: _Optional[float] = ..., books: _Optional[_Iterable[_Union[BooksTerm, _Mapping]]] = ..., books_difference: _Optional[int] = ...) -> None: ...

class ListNamespacesRequest(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: int
    def __init__(self, after: _Optional[int] = ...) -> None: ...

class ListNamespacesResponse(_message.Message):
    __slots__ = ("namespaces", "next_after")
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    NEXT_AFTER_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStatus]
    next_after: int
    def __init__(self, namespaces: _Optional[_Iterable[_Union[NamespaceStatus, _Mapping]]] = ..., next_after: _Optional[int] = ...) -> None: ...

class PauseNamespaceRequest(_message.Message):
    __slots__ = ("application", "namespace", "by")
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    application: str
    namespace: str
    by: str
    def __init__(self, application: _Optional[str] = ..., namespace: _Optional[str] = ..., by: _Optional[str] = ...) -> None: ...

class PauseNamespaceResponse(_message.Message):
    __slots__ = ("changed", "pending")
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    changed: bool
    pending: int
    def __init__(self, changed: bool = ..., pending: _Optional[int] = ...) -> None: ...

class ResumeNamespaceRequest(_message.Message):
    __slots__ = ("application", "namespace", "by")
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    application: str
    namespace: str
    by: str
    def __init__(self, application: _Optional[str] = ..., namespace: _Optional[str] = ..., by: _Optional[str] = ...) -> None: ...

class ResumeNamespaceResponse(_message.Message):
    __slots__ = ("changed", "pending")
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    changed: bool
    pending: int
    def __init__(self, changed: bool = ..., pending: _Optional[int] = ...) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "hostname", "pid", "version", "slots", "application", "namespaces", "holds", "started", "seen_seconds_ago")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    SEEN_SECONDS_AGO_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    hostname: str
    pid: int
    version: str
    slots: int
    application: str
    namespaces: _containers.RepeatedScalarFieldContainer[str]
    holds: int
    started: int
    seen_seconds_ago: float
    def __init__(self, worker_id: _Optional[str] = ..., hostname: _Optional[str] = ..., pid: _Optional[int] = ..., version: _Optional[str] = ..., slots: _Optional[int] = ..., application: _Optional[str] = ..., namespaces: _Optional[_Iterable[str]] = ..., holds: _Optional[int] = ..., started: _Optional[int] = ..., seen_seconds_ago: _Optional[float] = ...) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ...) -> None: ...

class DeadLetterFilter(_message.Message):
    __slots__ = ("application", "namespace", "taskname", "reason", "from_at", "until_at")
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TASKNAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FROM_AT_FIELD_NUMBER: _ClassVar[int]
    UNTIL_AT_FIELD_NUMBER: _ClassVar[int]
    application: str
    namespace: str
    taskname: str
    reason: str
    from_at: int
    until_at: int
    def __init__(self, application: _Optional[str] = ..., namespace: _Optional[str] = ..., taskname: _Optional[str] = ..., reason: _Optional[str] = ..., from_at: _Optional[int] = ..., until_at: _Optional[int] = ...) -> None: ...

class DeadLetter(_message.Message):
    __slots__ = ("seq", "id", "application", "namespace", "taskname", "reason", "dead_at", "story", "bytes")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TASKNAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DEAD_AT_FIELD_NUMBER: _ClassVar[int]
    STORY_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    seq: int
    id: str
    application: str
    namespace: str
    taskname: str
    reason: str
    dead_at: int
    story: str
    bytes: int
    def __init__(self, seq: _Optional[int] = ..., id: _Optional[str] = ..., application: _Optional[str] = ..., namespace: _Optional[str] = ..., taskname: _Optional[str] = ..., reason: _Optional[str] = ..., dead_at: _Optional[int] = ..., story: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class ListDeadLettersRequest(_message.Message):
    __slots__ = ("filter", "after_seq", "limit")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQ_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    filter: DeadLetterFilter
    after_seq: int
    limit: int
    def __init__(self, filter: _Optional[_Union[DeadLetterFilter, _Mapping]] = ..., after_seq: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListDeadLettersResponse(_message.Message):
    __slots__ = ("letters", "next_after_seq")
    LETTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_AFTER_SEQ_FIELD_NUMBER: _ClassVar[int]
    letters: _containers.RepeatedCompositeFieldContainer[DeadLetter]
    next_after_seq: int
    def __init__(self, letters: _Optional[_Iterable[_Union[DeadLetter, _Mapping]]] = ..., next_after_seq: _Optional[int] = ...) -> None: ...

class GetDeadLetterRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class GetDeadLetterResponse(_message.Message):
    __slots__ = ("letter", "activation")
    LETTER_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    letter: DeadLetter
    activation: bytes
    def __init__(self, letter: _Optional[_Union[DeadLetter, _Mapping]] = ..., activation: _Optional[bytes] = ...) -> None: ...

class ReplayDeadLettersRequest(_message.Message):
    __slots__ = ("seqs", "by")
    SEQS_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    seqs: _containers.RepeatedScalarFieldContainer[int]
    by: str
    def __init__(self, seqs: _Optional[_Iterable[int]] = ..., by: _Optional[str] = ...) -> None: ...

class Replayed(_message.Message):
    __slots__ = ("result", "id")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    result: ReplayResult
    id: str
    def __init__(self, result: _Optional[_Union[ReplayResult, str]] = ..., id: _Optional[str] = ...) -> None: ...

class ReplayDeadLettersResponse(_message.Message):
    __slots__ = ("replayed",)
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    replayed: _containers.RepeatedCompositeFieldContainer[Replayed]
    def __init__(self, replayed: _Optional[_Iterable[_Union[Replayed, _Mapping]]] = ...) -> None: ...

class DiscardDeadLettersRequest(_message.Message):
    __slots__ = ("seqs", "by")
    SEQS_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    seqs: _containers.RepeatedScalarFieldContainer[int]
    by: str
    def __init__(self, seqs: _Optional[_Iterable[int]] = ..., by: _Optional[str] = ...) -> None: ...

class DiscardDeadLettersResponse(_message.Message):
    __slots__ = ("discarded",)
    DISCARDED_FIELD_NUMBER: _ClassVar[int]
    discarded: int
    def __init__(self, discarded: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace_seconds", "by")
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    grace_seconds: float
    by: str
    def __init__(self, grace_seconds: _Optional[float] = ..., by: _Optional[str] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("finished", "phase", "left", "ended", "handed_over", "reasons")
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    finished: bool
    phase: str
    left: _containers.RepeatedCompositeFieldContainer[StateCount]
    ended: int
    handed_over: int
    reasons: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, finished: bool = ..., phase: _Optional[str] = ..., left: _Optional[_Iterable[_Union[StateCount, _Mapping]]] = ..., ended: _Optional[int] = ..., handed_over: _Optional[int] = ..., reasons: _Optional[_Iterable[str]] = ...) -> None: ...

class AdoptRequest(_message.Message):
    __slots__ = ("broker_id", "force", "by")
    BROKER_ID_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    broker_id: str
    force: bool
    by: str
    def __init__(self, broker_id: _Optional[str] = ..., force: bool = ..., by: _Optional[str] = ...) -> None: ...

class AdoptResponse(_message.Message):
    __slots__ = ("finished", "partitions", "adopted", "lost")
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    finished: bool
    partitions: int
    adopted: int
    lost: int
    def __init__(self, finished: bool = ..., partitions: _Optional[int] = ..., adopted: _Optional[int] = ..., lost: _Optional[int] = ...) -> None: ...

class QueryDatabaseRequest(_message.Message):
    __slots__ = ("sql", "limit")
    SQL_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    sql: str
    limit: int
    def __init__(self, sql: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class SqlValue(_message.Message):
    __slots__ = ("integer", "real", "text", "blob")
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    integer: int
    real: float
    text: str
    blob: bytes
    def __init__(self, integer: _Optional[int] = ..., real: _Optional[float] = ..., text: _Optional[str] = ..., blob: _Optional[bytes] = ...) -> None: ...

class SqlRow(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedCompositeFieldContainer[SqlValue]
    def __init__(self, values: _Optional[_Iterable[_Union[SqlValue, _Mapping]]] = ...) -> None: ...

class QueryDatabaseResponse(_message.Message):
    __slots__ = ("columns", "rows", "more")
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    columns: _containers.RepeatedScalarFieldContainer[str]
    rows: _containers.RepeatedCompositeFieldContainer[SqlRow]
    more: bool
    def __init__(self, columns: _Optional[_Iterable[str]] = ..., rows: _Optional[_Iterable[_Union[SqlRow, _Mapping]]] = ..., more: bool = ...) -> None: ...

class BackUpDatabaseRequest(_message.Message):
    __slots__ = ("id", "by")
    ID_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    id: str
    by: str
    def __init__(self, id: _Optional[str] = ..., by: _Optional[str] = ...) -> None: ...

class BackUpDatabaseResponse(_message.Message):
    __slots__ = ("finished", "pages_copied", "pages", "number")
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PAGES_COPIED_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    finished: bool
    pages_copied: int
    pages: int
    number: int
    def __init__(self, finished: bool = ..., pages_copied: _Optional[int] = ..., pages: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...
