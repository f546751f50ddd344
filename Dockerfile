# The trainer, with two targets. It has not been built yet and may need minor fixes.
#   docker build --target cpu  -t grpo:cpu  .      docker run --rm -it -v "$PWD/outputs:/app/outputs" grpo:cpu
#   docker build --target cuda -t grpo:cuda .      docker run --rm -it --gpus all --env-file .env -v "$PWD/outputs:/app/outputs" grpo:cuda \
#                                                    accelerate launch --config_file accelerate_configs/single_gpu.yaml launch/train.py --config ...
# --env-file passes keys at run time. .dockerignore excludes .env, runs and data from the image.
# outputs/ on the host must be writable by user id 1000; otherwise add --user "$(id -u)".

FROM python:3.11-slim AS base
# A compiler for torch.compile and for the CPU kernels, which are built at first use.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 trainer
WORKDIR /app
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

FROM base AS cpu
# Install torch from its CPU index first: the image is several gigabytes smaller without the CUDA libraries.
COPY requirements.txt pyproject.toml README.md ./
RUN pip install "$(grep '^torch==' requirements.txt)" --index-url https://download.pytorch.org/whl/cpu \
    && grep -v '^-e' requirements.txt > /tmp/requirements.txt && pip install -r /tmp/requirements.txt
COPY . .
RUN pip install --no-deps -e . && mkdir -p outputs && chown -R trainer:trainer /app
USER trainer
CMD ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", "launch/train.py"]

FROM base AS cuda
# The torch wheels include the CUDA libraries. The host needs only the driver and the NVIDIA container toolkit.
COPY requirements.txt pyproject.toml README.md ./
RUN grep -v '^-e' requirements.txt > /tmp/requirements.txt && pip install -r /tmp/requirements.txt
COPY . .
RUN pip install --no-deps -e . && mkdir -p outputs && chown -R trainer:trainer /app
USER trainer
CMD ["accelerate", "launch", "--config_file", "accelerate_configs/single_gpu.yaml", "launch/train.py"]
