from penstock_protocol.v1 import consumer_pb2 as _consumer_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RawGetTaskResponse(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: bytes
    def __init__(self, task: _Optional[bytes] = ...) -> None: ...

class RawSetTaskStatusResponse(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: bytes
    def __init__(self, task: _Optional[bytes] = ...) -> None: ...

class RawClaimedTask(_message.Message):
    __slots__ = ("activation", "claim_token", "deadline_ms", "expires_in_ms", "attempt")
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    CLAIM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    activation: bytes
    claim_token: bytes
    deadline_ms: int
    expires_in_ms: int
    attempt: int
    def __init__(self, activation: _Optional[bytes] = ..., claim_token: _Optional[bytes] = ..., deadline_ms: _Optional[int] = ..., expires_in_ms: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class RawGetTasksResponse(_message.Message):
    __slots__ = ("tasks", "pending", "lease_ms")
    TASKS_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[RawClaimedTask]
    pending: _containers.RepeatedCompositeFieldContainer[_consumer_pb2.PendingCount]
    lease_ms: int
    def __init__(self, tasks: _Optional[_Iterable[_Union[RawClaimedTask, _Mapping]]] = ..., pending: _Optional[_Iterable[_Union[_consumer_pb2.PendingCount, _Mapping]]] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class RawSendTasksRequest(_message.Message):
    __slots__ = ("activations",)
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    activations: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, activations: _Optional[_Iterable[bytes]] = ...) -> None: ...
