# Triton from PyPI and our backends, on CPU, and the gateway. Models are mounted at /models; nothing is
# built here.
FROM debian:bookworm-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
# Two layers: dependencies change rarely, the code often.
COPY LICENSE README.md constraints-py311.txt pyproject.toml ./
RUN mkdir --parents client/halimede python_backend tools/halimede_tools \
    && python3 -m venv /opt/halimede \
    && /opt/halimede/bin/pip install --no-cache-dir --constraint constraints-py311.txt '.[server,gateway,redis]' \
    && /opt/halimede/bin/pip uninstall --yes halimede mpmath sympy
COPY . .
RUN /opt/halimede/bin/pip install --no-cache-dir --no-deps . \
    && /opt/halimede/bin/pip uninstall --yes pip setuptools \
    && cd /opt/halimede \
    && bin/python -m halimede_tools.serve.wheel backends

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends libpython3.11 python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin halimede
COPY --from=build /opt/halimede /opt/halimede
# The root file system may be read-only: the server writes to /tmp and /dev/shm only.
ENV PATH=/opt/halimede/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HALIMEDE_BACKENDS=/opt/halimede/backends \
    HALIMEDE_REPOSITORY=/models
WORKDIR /opt/halimede
USER 10001
VOLUME /models
EXPOSE 8000 8001 8002 8080
HEALTHCHECK --interval=15s --timeout=10s --start-period=2m --retries=3 CMD ["halimede", "health"]
ENTRYPOINT ["halimede", "serve", "--exec"]
CMD ["--host", "0.0.0.0"]
