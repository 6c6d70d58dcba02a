# The server of a federation, `federa serve`, for a machine without a GPU (x86-64 or ARM64). From the repository's root:
#
#     docker build -f docker/server.Dockerfile -t federa-server .
#     docker run --rm -p 8443:8443 --user "$(id -u)" -v "$PWD/federation:/federation" federa-server
#
# federation/ holds recipe.yaml, the evaluation set, pki/server (docs/edge.md) and runs/, and belongs to that user.
# Keys are mounted, never part of the image. NOT BUILT where it was written, for want of a Docker daemon:
# tests/test_docker.py checks what can be checked by reading.
FROM python:3.12.12-slim-bookworm

# The compiled kernels of the evaluation; without a compiler it works, more slowly.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/federa
COPY constraints.txt ./
COPY docker/constraints.txt docker/
# torch first, from the index whose builds bring no CUDA packages along.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt -c docker/constraints.txt ".[flower,privacy,quickstart]"

# A user without a name, so that --user may give any other number: whose files the mounted ones are.
RUN install -d -m 1777 /home/federa /federation
ENV HOME=/home/federa USER=federa
USER 1000
WORKDIR /federation
EXPOSE 8443
# What Ctrl-C sends: the round in hand is given up, and what was finished is kept.
STOPSIGNAL SIGINT
HEALTHCHECK --start-period=120s --interval=30s --timeout=5s \
    CMD ["python", "-c", "import socket; socket.create_connection(('127.0.0.1', 8443), 3).close()"]
ENTRYPOINT ["federa", "serve"]
# --resume: a container that is started again goes on.
CMD ["recipe.yaml", "--certs", "pki/server", "--host", "0.0.0.0", "--port", "8443", "--out", "runs/first", "--resume"]
