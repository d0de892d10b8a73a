# Stand-in for an image that a closed network cannot pull: the same program from Debian.
FROM debian:bookworm-slim
ARG PACKAGE
RUN apt-get update \
    && apt-get install -y --no-install-recommends ${PACKAGE} \
    && rm -rf /var/lib/apt/lists/*
