# The trainer. From the repository's root:
#
#   docker build -f deploy/docker/trainer.Dockerfile -t kdmesh-trainer .
#
# On GPUs, on an image that has torch for CUDA (docs/containers.md):
#
#   docker build -f deploy/docker/trainer.Dockerfile -t kdmesh-trainer:cuda \
#     --build-arg BASE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime --build-arg TORCH= --build-arg CONSTRAINTS=/dev/null .

# With a digest (NAME:TAG@sha256:...) a build has the same bits every time.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
# The same steps in every image, so that their layers are shared.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG CONSTRAINTS=deploy/docker/constraints.txt
ARG EXTRAS="demo jwt kubernetes lora tracing"
WORKDIR /src
COPY pyproject.toml deploy/docker/constraints.txt deploy/docker/
# What the base image has is used, and not installed again.
RUN python3 -m venv --without-pip --system-site-packages /opt/kdmesh \
 && if [ -n "${TORCH}" ]; then \
      python3 -m pip --python /opt/kdmesh/bin/python install --no-cache-dir --extra-index-url "${TORCH_INDEX}" "${TORCH}"; \
    fi
RUN python3 -c "import os, tomllib; p = tomllib.load(open('deploy/docker/pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *(each for extra in os.environ['EXTRAS'].split() for each in p['optional-dependencies'][extra]), sep='\n')" > requirements.txt \
 && python3 -m pip --python /opt/kdmesh/bin/python install --no-cache-dir -c "${CONSTRAINTS}" -r requirements.txt
COPY pyproject.toml README.md ./
COPY kdmesh kdmesh
COPY services services
RUN python3 -m pip --python /opt/kdmesh/bin/python install --no-cache-dir --no-deps .

FROM ${BASE}
# /run/kdmesh: sockets through which containers of one node share memory; the same user in all of them may use those.
RUN groupadd --gid 10001 kdmesh \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin kdmesh \
 && install -d -o kdmesh -g kdmesh -m 0770 /run/kdmesh /runs /models
COPY --from=build /opt/kdmesh /opt/kdmesh
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="kdmesh trainer" \
      org.opencontainers.image.description="Distils a student from the rows of a teacher" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/kdmesh/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
USER 10001:10001
WORKDIR /runs
STOPSIGNAL SIGTERM
# A job ends by itself, well or not; a probe could only disturb it.
HEALTHCHECK NONE
ENTRYPOINT ["kdmesh", "train"]
CMD ["/etc/kdmesh/train.yaml"]
