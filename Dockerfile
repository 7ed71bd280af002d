# syntax=docker/dockerfile:1
# Written without a Docker daemon: nobody has built this file yet. hadolint finds nothing in it.
#
#   docker build --target cpu -t t2t-vit:cpu .    # or cuda, or tpu, in both places
#   docker run --rm -v "$PWD:/home/t2t/here" t2t-vit:cpu predict t2t_vit_14 here/photos
#   docker run --rm --gpus all --shm-size=8g -v "$PWD:/home/t2t/here" t2t-vit:cuda train --workdir=here/runs/digits
#   docker run --rm --privileged --net=host -v "$PWD:/home/t2t/here" t2t-vit:tpu train --workdir=here/runs/digits
#
# `--build-arg EXTRAS=fast,hub,plots,tfds,gcs` installs other extras of pyproject.toml. The user has the id 1000, and must be able to
# write to a mounted folder that results go to. CUDA comes with jax's wheels; the host needs the driver and NVIDIA's
# container toolkit. A TPU VM may give its devices to root alone: then add `--user 0`.
FROM python:3.13-slim AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/t2t
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY configs configs
COPY t2t_vit_jax t2t_vit_jax
ARG EXTRAS=fast,hub,plots,tfds

FROM builder AS builder-cpu
RUN /opt/t2t/bin/pip install ".[${EXTRAS}]"

FROM builder AS builder-cuda
RUN /opt/t2t/bin/pip install ".[cuda13,${EXTRAS}]"

FROM builder AS builder-tpu
RUN /opt/t2t/bin/pip install ".[tpu,${EXTRAS}]"

FROM python:3.13-slim AS base
RUN useradd --create-home --uid 1000 t2t
ENV PATH=/opt/t2t/bin:$PATH PYTHONUNBUFFERED=1 HOME=/home/t2t
USER 1000
WORKDIR /home/t2t
ENTRYPOINT ["t2t-vit"]
CMD ["--help"]

FROM base AS tpu
COPY --from=builder-tpu /opt/t2t /opt/t2t

FROM base AS cuda
COPY --from=builder-cuda /opt/t2t /opt/t2t

FROM base AS cpu
COPY --from=builder-cpu /opt/t2t /opt/t2t
