# NVIDIA's Triton and what python_backend/ adds to it: the container of `make serve ARGS='--runtime
# docker'` as an image, for clusters. Not run on a GPU yet.
ARG BASE=nvcr.io/nvidia/tritonserver:24.10-py3

FROM scratch AS ours
COPY python_backend/tokenizer /backends/tokenizer
COPY python_backend/pooler /backends/pooler
COPY python_backend/image /backends/image
COPY python_backend/fusion /backends/fusion
COPY python_backend/adapter /backends/adapter
COPY python_backend/halimede_engine /backends/halimede_engine
COPY python_backend/halimede_ops /backends/halimede_ops
COPY python_backend/halimede_repository /backends/halimede_repository
COPY python_backend/halimede_launch /start/halimede_launch
COPY python_backend/halimede_ops /start/halimede_ops
COPY python_backend/halimede_repository /start/halimede_repository

FROM ${BASE}
RUN python3 -m pip install --no-cache-dir --no-deps tokenizers==0.22.2 pillow==12.3.0
COPY --from=ours /backends /opt/tritonserver/backends
COPY --from=ours /start /opt/halimede
# The root file system may be read-only.
ENV TOKENIZERS_PARALLELISM=false \
    MALLOC_MMAP_THRESHOLD_=1048576 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/halimede
USER triton-server
# What `halimede serve --host 0.0.0.0` starts; a test compares them. Model control is closed unless
# `--control-key-file=…` stands behind it.
ENTRYPOINT ["python3", "-m", "halimede_launch.start", "tritonserver", \
    "--model-repository=/models", \
    "--model-control-mode=explicit", "--load-model=*", \
    "--disable-auto-complete-config", "--exit-on-error=true", "--strict-readiness=true", \
    "--http-address=0.0.0.0", "--http-port=8000", \
    "--grpc-address=0.0.0.0", "--grpc-port=8001", \
    "--grpc-infer-allocation-pool-size=1", \
    "--grpc-max-connection-age=300000", "--grpc-max-connection-age-grace=60000", \
    "--metrics-address=0.0.0.0", "--metrics-port=8002", \
    "--log-error=true", "--log-warning=true", "--log-info=false", "--log-verbose=0", \
    "--control-closed"]
