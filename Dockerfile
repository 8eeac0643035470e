# The image for Kubernetes and for Slurm with containers: this package, its pinned dependencies, and the compiler with
# which DeepSpeed builds its offloading code when a run starts. It does not run as root.
#
#   docker build -t registry.example.com/phi3v-dist:0.1.0 .
#   docker build --build-arg BASE=... --build-arg PIP_ARGS="--extra-index-url https://..." .
#
# BASE: Debian 12, Ubuntu 24.04 or newer (Python 3.11). torch's wheels contain the CUDA libraries; the driver comes from
# the node. Only offloading needs a `devel` image, for its CUDA headers.
ARG BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04
FROM ${BASE}

ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ libaio-dev libibverbs1 ninja-build \
        python3 python3-dev python3-venv rdma-core \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/phi3v
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# Dependencies first: a change of the code does not rebuild this layer.
ARG PIP_ARGS=""
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python3 -m venv /opt/venv \
    && python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > /tmp/dependencies.txt \
    && pip install ${PIP_ARGS} -c constraints.txt -r /tmp/dependencies.txt
COPY launch launch
COPY shards shards
COPY phi3v_dist phi3v_dist
COPY configs configs
RUN pip install --no-deps .

# The user id of k8s/. No home directory is needed: there HOME is a volume.
RUN groupadd --gid 1000 --non-unique phi3v && useradd --uid 1000 --gid 1000 --non-unique --no-create-home phi3v
USER 1000:1000
ENV HOME=/tmp
WORKDIR /tmp
ENTRYPOINT []
CMD ["phi3v", "--help"]
