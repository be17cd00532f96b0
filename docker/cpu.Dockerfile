# Serves bundles on a CPU with ONNX Runtime.
#   docker build -f docker/cpu.Dockerfile -t pnp-trt:cpu .
#   docker run --rm -v "$PWD/engines:/engines:ro" -v "$PWD/samples:/samples" pnp-trt:cpu sample "a red apple" --out /samples
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE constraints.txt ./
COPY pnp_trt ./pnp_trt
RUN pip install --no-cache-dir -c constraints.txt . && rm -rf /src/pnp_trt
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENV PNP_TRT_ENGINES=/engines
ENTRYPOINT ["pnp-trt"]
CMD ["--help"]
