# Builds models into a repository, with PyTorch and the exporters. Serving does not need them.
FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends libpython3.11 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin halimede
WORKDIR /opt/halimede
COPY . .
# Prefer an index with PyTorch's CPU build: the other builds install gigabytes of CUDA.
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --constraint constraints-py311.txt --editable '.[server,build]'
ENV PATH=/opt/halimede/.venv/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    HALIMEDE_HOME=/work \
    HALIMEDE_REPOSITORY=/models
USER 10001
VOLUME ["/work", "/models"]
ENTRYPOINT ["halimede"]
CMD ["build"]
