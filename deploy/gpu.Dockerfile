# NVIDIA's Triton with halimede's backends: what `halimede serve --runtime docker` starts, as an
# image for `make up PROFILE=gpu` and for clusters. Not run on a GPU yet.
ARG BASE=nvcr.io/nvidia/tritonserver:24.10-py3

FROM ${BASE} AS layout
COPY python_backend /source/python_backend
COPY tools /source/tools
WORKDIR /source/tools
RUN python3 -m halimede_tools.serve.container_files ../python_backend /layout

FROM ${BASE}
COPY constraints-py311.txt /tmp/
COPY --from=layout /layout/requirements.txt /tmp/
RUN python3 -m pip install --no-cache-dir --no-deps \
    --constraint /tmp/constraints-py311.txt --requirement /tmp/requirements.txt
COPY --from=layout /layout/root /
# The root file system may be read-only.
ENV TOKENIZERS_PARALLELISM=false \
    OPENBLAS_NUM_THREADS=1 \
    MALLOC_MMAP_THRESHOLD_=1048576 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/halimede
USER triton-server
# The arguments of `halimede serve --host 0.0.0.0`; a test compares them. Model control is closed
# unless the container's arguments have `--control-key-file=…`.
ENTRYPOINT ["python3", "-m", "halimede_launch.start", "tritonserver", \
    "--model-repository=/models", \
    "--model-control-mode=explicit", "--load-model=*", \
    "--disable-auto-complete-config", "--exit-on-error=true", "--strict-readiness=true", \
    "--http-address=0.0.0.0", "--http-port=8000", \
    "--grpc-address=0.0.0.0", "--grpc-port=8001", \
    "--grpc-infer-allocation-pool-size=1", \
    "--grpc-max-connection-age=30000", "--grpc-max-connection-age-grace=60000", \
    "--metrics-address=0.0.0.0", "--metrics-port=8002", \
    "--log-error=true", "--log-warning=true", "--log-info=false", "--log-verbose=0", \
    "--control-closed"]
