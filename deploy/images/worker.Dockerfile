# docker build -f deploy/images/worker.Dockerfile -t penstock-worker .
#
# Your tasks go into an image of your own:
#
#   FROM penstock-worker
#   COPY . /app
#   CMD ["shop.tasks:app"]
#
# Further options follow the app: CMD ["shop.tasks:app", "--concurrency", "8"].
ARG PYTHON=3.13-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /source
COPY requirements requirements
COPY packages packages
COPY deploy/images/install.sh deploy/images/install.sh
RUN deploy/images/install.sh /opt/penstock worker

FROM python:${PYTHON}
RUN useradd --system --uid 10001 --no-create-home penstock
COPY --from=build /opt/penstock /opt/penstock
COPY deploy/images/worker_health.py /opt/penstock/health.py
ENV PATH=/opt/penstock/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /app
USER 10001
EXPOSE 51052
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 CMD ["python", "/opt/penstock/health.py", "51052"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["penstock-worker", "run", "--log-format=json", "--metrics-addr=0.0.0.0", "--metrics-port=51052"]
