# Stand-in for NVIDIA's Triton image where it cannot be pulled: the wheel's Triton at NVIDIA's paths,
# and our Python backend `onnxruntime` in the place of the C++ one. Nothing else of ours is in it.
FROM halimede/triton-cpu:0.1.0
USER root
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd triton-server
RUN mkdir /opt/tritonserver \
    && mv /opt/halimede/backends /opt/tritonserver/backends \
    && cd /opt/tritonserver/backends \
    && rm -r embedder tokenizer pooler image fusion adapter halimede_* \
    && mv /opt/halimede /opt/wheel \
    && rm -r /opt/wheel/lib/python3.11/site-packages/halimede* \
    && /opt/wheel/bin/python -m ensurepip
COPY tritonserver /usr/local/bin/
ENV PATH=/opt/wheel/bin:$PATH PYTHONDONTWRITEBYTECODE=
WORKDIR /
ENTRYPOINT []
CMD []
HEALTHCHECK NONE
