# docker build -f deploy/images/broker.Dockerfile -t penstock-broker .
ARG PYTHON=3.13-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /source
COPY requirements requirements
COPY packages packages
COPY deploy/images/install.sh deploy/images/install.sh
RUN deploy/images/install.sh /opt/penstock broker

FROM python:${PYTHON}
RUN useradd --system --uid 10001 --home-dir /var/lib/penstock --create-home penstock
COPY --from=build /opt/penstock /opt/penstock
COPY deploy/images/broker_health.py /opt/penstock/health.py
ENV PATH=/opt/penstock/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TASKBROKER_DB_PATH=/var/lib/penstock/inflight.sqlite \
    TASKBROKER_GRPC_ADDR=0.0.0.0 \
    TASKBROKER_METRICS_ADDR=0.0.0.0 \
    TASKBROKER_LOG_FORMAT=json
USER 10001
# Nothing else is written to: run with a read-only root file system.
VOLUME /var/lib/penstock
EXPOSE 50051 51051
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 CMD ["python", "/opt/penstock/health.py"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["penstock-broker"]
CMD ["serve"]
