# What builds models into a repository: PyTorch and the exporters. Serving needs none of it.
FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends libpython3.11 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin halimede
WORKDIR /opt/halimede
COPY . .
# PyTorch's CPU build, where the package index has one: its other builds bring gigabytes of CUDA.
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
