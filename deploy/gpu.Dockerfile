# NVIDIA's Triton and what python_backend/ adds to it: the container of `make serve ARGS='--runtime
# docker'` as an image, for clusters. Not run on a GPU yet.
FROM nvcr.io/nvidia/tritonserver:24.10-py3
RUN python3 -m pip install --no-cache-dir --no-deps tokenizers==0.22.2 pillow==12.3.0
COPY python_backend/tokenizer /opt/tritonserver/backends/tokenizer
COPY python_backend/pooler /opt/tritonserver/backends/pooler
COPY python_backend/image /opt/tritonserver/backends/image
COPY python_backend/fusion /opt/tritonserver/backends/fusion
COPY python_backend/halimede_ops /opt/tritonserver/backends/halimede_ops
COPY python_backend/triton_adapter.py /opt/tritonserver/backends/
COPY python_backend/triton_metrics.py /opt/tritonserver/backends/
ENV TOKENIZERS_PARALLELISM=false
USER triton-server
ENTRYPOINT ["tritonserver", "--model-repository=/models", "--model-control-mode=explicit", "--load-model=*", "--disable-auto-complete-config", "--exit-on-error=true", "--strict-readiness=true"]
