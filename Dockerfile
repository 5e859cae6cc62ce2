# The registry and the mirror in one image; docker-compose.yml uses it. Versions are those of requirements/dev.lock.
FROM python:3.11-slim-bookworm
COPY pyproject.toml README.md LICENSE /src/
COPY requirements/dev.lock /src/requirements/dev.lock
COPY artifact /src/artifact
COPY registry /src/registry
COPY mirror /src/mirror
COPY runtime /src/runtime
COPY migrations /src/migrations
RUN pip install --no-cache-dir --constraint /src/requirements/dev.lock '/src[registry,mirror,otel]' \
    && useradd --uid 1000 --create-home airlock \
    && install -d -o airlock -g airlock -m 700 /data /mirror
USER airlock
VOLUME ["/data", "/mirror"]
EXPOSE 5000 9100
ENTRYPOINT ["airlock"]
CMD ["registry", "serve"]
