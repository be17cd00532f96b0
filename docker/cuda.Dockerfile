# Builds and serves bundles on an NVIDIA GPU: PyTorch, ONNX Runtime with CUDA and TensorRT for RTX.
#   docker build -f docker/cuda.Dockerfile -t pnp-trt:cuda .
#   docker run --rm --gpus all -v "$PWD/engines:/engines" pnp-trt:cuda build --backend tensorrt-rtx --precision fp16
# For data-centre GPUs install the extra `tensorrt` instead of `rtx`.
FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE constraints.txt ./
COPY pnp_trt ./pnp_trt
ARG EXTRAS=build,rtx
RUN pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]" && rm -rf /src/pnp_trt
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENV PNP_TRT_ENGINES=/engines
ENTRYPOINT ["pnp-trt"]
CMD ["--help"]
