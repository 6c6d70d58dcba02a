# A client on a Jetson board, `federa join`, ARM64 with the board's own GPU. On the board, from the repository's root:
#
#     docker build -f docker/jetson.Dockerfile -t federa-jetson .
#     docker run -d --name federa --restart unless-stopped --runtime nvidia --network host --shm-size 1g \
#         --user "$(id -u)" --group-add "$(getent group video | cut -d: -f3)" \
#         --group-add "$(getent group render | cut -d: -f3)" -v "$PWD/federation:/federation" federa-jetson \
#         fed.example.org:8443 recipe.yaml data.train=data.parquet device=cuda client.precision=bf16 \
#         client.micro_batch=1 client.checkpointing=true --keys keys
#
# federation/ holds recipe.yaml, the client's own table and its keys (docs/edge.md). NOT BUILT where it was written:
# there was neither a Docker daemon nor a board. tests/test_docker.py checks what can be checked by reading; the
# checks between the steps below end a build that cannot work.
#
# The base must have Python 3.11 or newer and a torch for the board's GPU (Orin: sm_87). NVIDIA's -igpu images are that
# from 24.11 on: 26.02 is of Ubuntu 24.04, Python 3.12 and CUDA 13, for JetPack 7.2. Of the others l4t-pytorch ends with
# JetPack 5 (Python 3.8), and JetPack 6's own Python is 3.10; there, try BASE=nvcr.io/nvidia/pytorch:25.06-py3-igpu.
ARG BASE=nvcr.io/nvidia/pytorch:26.02-py3-igpu
FROM ${BASE}

# The base pins all that it came with. Its torch must stay; numpy and others may be too old for federa.
ENV PIP_CONSTRAINT="" PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /opt/federa
RUN python3 -c "import sys; assert sys.version_info >= (3, 11), 'the base has Python ' + sys.version" \
    && python3 -c "import torch; assert torch.version.cuda, 'the torch of the base knows no GPU'" \
    && python3 -c "from importlib.metadata import version; print('torch==' + version('torch'))" > base.txt
COPY docker/constraints.txt docker/
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN python3 -m pip install --no-cache-dir -c base.txt -c docker/constraints.txt ".[flower,privacy,quickstart]" \
    && python3 -c "import numpy, torch; assert torch.from_numpy(numpy.ones(2)).sum() == 2" \
    && federa list > /dev/null

# A user without a name, so that --user may give any other number: whose files the mounted ones are.
RUN install -d -m 1777 /home/federa /federation
ENV HOME=/home/federa USER=federa
USER 1000
WORKDIR /federation
# What Ctrl-C sends. There is no health check: a node listens at no port, and what ends is started again.
STOPSIGNAL SIGINT
ENTRYPOINT ["federa", "join"]
CMD ["--help"]
