"""The RPC edge: methods of bytes become a gRPC server with authentication, health and reflection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from penstock_broker.auth import authorize
from penstock_broker.dispatch.admin import Admin
from penstock_broker.dispatch.service import Consumers, Refused
from penstock_broker.store.database import DiskFailing
from penstock_broker.store.writer import StoreStopped
from penstock_protocol.v1 import admin_pb2, consumer_pb2, producer_pb2, taskbroker_pb2

log = structlog.get_logger("rpc")

Method = Callable[[bytes], Awaitable[bytes]]
Observe = Callable[[str, str, float], None]

CONSUMER = consumer_pb2.DESCRIPTOR.services_by_name["ConsumerService"].full_name
PRODUCER = producer_pb2.DESCRIPTOR.services_by_name["ProducerService"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
TASKBROKER_V1 = taskbroker_pb2.DESCRIPTOR.services_by_name["ConsumerService"].full_name
HEALTH_WATCH_SECONDS = 1.0


def consumer_methods(consumers: Consumers) -> dict[str, Method]:
    """ConsumerService of penstock.v1."""
    return {
        **taskbroker_methods(consumers),
        "GetTasks": consumers.get_tasks,
        "SetTaskStatuses": consumers.set_task_statuses,
        "ExtendClaims": consumers.extend_claims,
        "ReleaseTasks": consumers.release_tasks,
    }


def taskbroker_methods(consumers: Consumers) -> dict[str, Method]:
    """ConsumerService of taskbroker v1."""
    return {
        "GetTask": consumers.get_task,
        "SetTaskStatus": consumers.set_task_status,
        "SetBatchActivationStatus": consumers.set_batch_activation_status,
    }


def admin_methods(admin: Admin) -> dict[str, Method]:
    """AdminService of penstock.v1."""
    return {
        "GetStatus": admin.get_status,
        "ListTasks": admin.list_tasks,
        "GetTask": admin.get_task,
        "ExplainTask": admin.explain_task,
        "RetryTasks": admin.retry_tasks,
        "CancelTasks": admin.cancel_tasks,
        "ListNamespaces": admin.list_namespaces,
        "PauseNamespace": admin.pause_namespace,
        "ResumeNamespace": admin.resume_namespace,
        "ListWorkers": admin.list_workers,
        "ListDeadLetters": admin.list_dead_letters,
        "GetDeadLetter": admin.get_dead_letter,
        "ReplayDeadLetters": admin.replay_dead_letters,
        "DiscardDeadLetters": admin.discard_dead_letters,
    }


class Health(health_pb2_grpc.HealthServicer):
    """Computed when asked."""

    def __init__(self, healthy: Callable[[], bool], services: Sequence[str]) -> None:
        self._healthy = healthy
        self._services = {"", *services}

    def _status(self, service: str) -> health_pb2.HealthCheckResponse:
        response = health_pb2.HealthCheckResponse
        if service not in self._services:
            return response(status=response.SERVICE_UNKNOWN)
        return response(status=response.SERVING if self._healthy() else response.NOT_SERVING)

    async def Check(  # noqa: N802 - the name gRPC gives it
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return self._status(request.service)

    async def Watch(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        last = None
        while True:
            status = self._status(request.service)
            if status != last:
                yield status
                last = status
            await asyncio.sleep(HEALTH_WATCH_SECONDS)


def build(
    services: Mapping[str, Mapping[str, Method]],
    *,
    secrets: Sequence[str],
    healthy: Callable[[], bool],
    message_bytes_max: int,
    observe: Observe,
) -> grpc.aio.Server:
    """A server of these services (full name -> method name -> method), not started.

    With ``secrets`` every call but health and reflection must be signed. ``observe`` is told method,
    status code and seconds of each call.
    """
    server = grpc.aio.server(
        options=(
            # Without it two brokers would share a port instead of the second one failing.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", message_bytes_max),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", 16 * 1024),
            ("grpc.max_concurrent_streams", 4096),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.http2.max_ping_strikes", 0),
        )
    )
    for service, methods in services.items():
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            name: grpc.unary_unary_rpc_method_handler(_edge(f"/{service}/{name}", method, secrets, observe))
            for name, method in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    health_pb2_grpc.add_HealthServicer_to_server(Health(healthy, tuple(services)), server)
    reflection.enable_server_reflection(
        (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
        server,
    )
    return server


def _edge(
    path: str, method: Method, secrets: Sequence[str], observe: Observe
) -> Callable[[bytes, grpc.aio.ServicerContext[bytes, bytes]], Awaitable[bytes]]:
    async def handle(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        begun = time.perf_counter()
        code, message = grpc.StatusCode.OK, ""
        try:
            if secrets and not authorize(secrets, path, request, context.invocation_metadata() or ()):
                code, message = (
                    grpc.StatusCode.UNAUTHENTICATED,
                    "the call is not signed with a secret of this broker",
                )
            else:
                return await method(request)
        except Refused as refused:
            code, message = refused.code, refused.message
        except StoreStopped:
            code, message = grpc.StatusCode.UNAVAILABLE, "the broker is stopping"
        except DiskFailing as failing:
            code = grpc.StatusCode.UNAVAILABLE
            message = f"the broker's disk does not take what is written ({failing}): repeat the call"
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception:
            code, message = grpc.StatusCode.INTERNAL, "the broker failed on this call; its log says why"
            log.exception("a call failed", method=path)
        finally:
            observe(path, code.name, time.perf_counter() - begun)
        await context.abort(code, message)
        raise AssertionError("abort returned")

    return handle
