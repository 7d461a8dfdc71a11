from penstock_protocol.v1 import activation_pb2 as _activation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SendResult(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEND_RESULT_UNSPECIFIED: _ClassVar[SendResult]
    SEND_RESULT_ACCEPTED: _ClassVar[SendResult]
    SEND_RESULT_DUPLICATE: _ClassVar[SendResult]
    SEND_RESULT_REJECTED: _ClassVar[SendResult]
SEND_RESULT_UNSPECIFIED: SendResult
SEND_RESULT_ACCEPTED: SendResult
SEND_RESULT_DUPLICATE: SendResult
SEND_RESULT_REJECTED: SendResult

class SendTasksRequest(_message.Message):
    __slots__ = ("activations",)
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    activations: _containers.RepeatedCompositeFieldContainer[_activation_pb2.TaskActivation]
    def __init__(self, activations: _Optional[_Iterable[_Union[_activation_pb2.TaskActivation, _Mapping]]] = ...) -> None: ...

class SendAnswer(_message.Message):
    __slots__ = ("result", "reason")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    result: SendResult
    reason: str
    def __init__(self, result: _Optional[_Union[SendResult, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class SendTasksResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[SendAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[SendAnswer, _Mapping]]] = ...) -> None: ...
