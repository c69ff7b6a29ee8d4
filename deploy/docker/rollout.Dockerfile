# The rollout server. From the repository's root:
#
#   docker build -f deploy/docker/rollout.Dockerfile -t kdmesh-rollout .
#
# On GPUs, on the image of SGLang, which has torch (docs/containers.md):
#
#   docker build -f deploy/docker/rollout.Dockerfile -t kdmesh-rollout:cuda \
#     --build-arg BASE=lmsysorg/sglang:v0.5.23 --build-arg TORCH= --build-arg CONSTRAINTS=/dev/null .

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
LABEL org.opencontainers.image.title="kdmesh rollout" \
      org.opencontainers.image.description="Samples from a student whose weights a trainer replaces" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY deploy/docker/healthy.py /opt/kdmesh/healthy.py
ENV PATH=/opt/kdmesh/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    KDMESH_HEALTH_URL=http://127.0.0.1:8061/readyz
USER 10001:10001
WORKDIR /runs
EXPOSE 50061 8061
STOPSIGNAL SIGTERM
# Loading a large model takes long; that it fails is known by the process's end.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30m --retries=3 CMD ["python3", "/opt/kdmesh/healthy.py"]
ENTRYPOINT ["kdmesh", "rollout"]
CMD ["/etc/kdmesh/rollout.yaml"]
