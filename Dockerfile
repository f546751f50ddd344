# One trainer, two targets. Written without being built (no docker where it was made): tell us if a line is wrong.
#   docker build --target cpu  -t grpo:cpu  .      docker run --rm -it -v "$PWD/outputs:/app/outputs" grpo:cpu
#   docker build --target cuda -t grpo:cuda .      docker run --rm -it --gpus all --env-file .env -v "$PWD/outputs:/app/outputs" grpo:cuda \
#                                                    accelerate launch --config_file accelerate_configs/single_gpu.yaml launch/train.py --config ...
# Keys come with --env-file at run time; .dockerignore keeps .env, runs and data out of the image.
# outputs/ on the host must be writable by user id 1000, or add --user "$(id -u)".

FROM python:3.11-slim AS base
# A C++ compiler for torch.compile and for kernels that are built on first use.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 trainer
WORKDIR /app
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

FROM base AS cpu
# torch from its CPU index first: without the CUDA libraries the image is several gigabytes smaller.
COPY requirements.txt pyproject.toml README.md ./
RUN pip install "$(grep '^torch==' requirements.txt)" --index-url https://download.pytorch.org/whl/cpu \
    && grep -v '^-e' requirements.txt > /tmp/requirements.txt && pip install -r /tmp/requirements.txt
COPY . .
RUN pip install --no-deps -e . && mkdir -p outputs && chown -R trainer:trainer /app
USER trainer
CMD ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", "launch/train.py"]

FROM base AS cuda
# torch's own wheels bring the CUDA libraries; the host needs the driver and the NVIDIA container toolkit only.
COPY requirements.txt pyproject.toml README.md ./
RUN grep -v '^-e' requirements.txt > /tmp/requirements.txt && pip install -r /tmp/requirements.txt
COPY . .
RUN pip install --no-deps -e . && mkdir -p outputs && chown -R trainer:trainer /app
USER trainer
CMD ["accelerate", "launch", "--config_file", "accelerate_configs/single_gpu.yaml", "launch/train.py"]
