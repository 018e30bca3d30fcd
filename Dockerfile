# docker build -t vqmoe_ds .
# docker run --rm -v "$PWD":/work vqmoe_ds vqmoe-pretrain --data my_text.txt --run_dir runs/mine        (--gpus all: on GPUs)
FROM python:3.12-slim-bookworm
# DeepSpeed builds extensions at their first use, and our CPU kernels are compiled there.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/vqmoe_ds
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps .
WORKDIR /work
CMD ["vqmoe-pretrain", "--help"]
