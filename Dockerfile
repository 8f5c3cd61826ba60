# nest-runtime as a server, in a small image.
#
#   docker build -t nest-runtime .                          for CPUs, 1.6 GB
#   docker build -t nest-runtime --build-arg TORCH=cuda .   for NVIDIA GPUs, with CUDA's libraries: 5 GB more
#   docker run --rm -p 127.0.0.1:8000:8000 -v nest:/data -e NEST_SERVE_PATCH=v3 nest-runtime
#
# Every option of `nest-runtime serve` is a variable: --max-queue 64 is -e NEST_SERVE_MAX_QUEUE=64.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG TORCH=cpu
# Extras to install, e.g. sign,gguf
ARG EXTRAS=sign
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/nest-runtime
# The large part first: it stays in the cache when only our own code changes.
COPY constraints.txt deploy/install.sh ./
RUN sh install.sh torch "${TORCH}"
COPY pyproject.toml README.md LICENSE nest_verify.py ./
COPY nest_runtime nest_runtime
COPY patches patches
COPY docs/results/compare docs/results/compare
COPY docs/results/real docs/results/real
RUN sh install.sh package "${EXTRAS}"

FROM python:${PYTHON}-slim
LABEL org.opencontainers.image.title="nest-runtime" \
      org.opencontainers.image.description="Language models with safety patches, behind OpenAI's API" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --create-home --home-dir /data --shell /usr/sbin/nologin nest
COPY --from=build /opt/nest-runtime /opt/nest-runtime
COPY deploy/healthcheck.py /opt/nest-runtime/healthcheck.py
ENV PATH=/opt/nest-runtime/bin:$PATH \
    NEST_HOME=/data/nest \
    HF_HOME=/data/huggingface \
    NEST_SERVE_HOST=0.0.0.0 \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# A model may load for a while; after that, three failures in a row make the container unhealthy.
HEALTHCHECK --start-period=10m --interval=10s --timeout=5s --retries=3 \
    CMD ["python", "/opt/nest-runtime/healthcheck.py"]
ENTRYPOINT ["nest-runtime"]
CMD ["serve"]
