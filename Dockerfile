# Build: docker build -t archscale-megatron .
# Run:   docker run --gpus all --ipc host -v /data:/data archscale-megatron bash examples/sambay_d16_8gpu.sh
FROM nvcr.io/nvidia/pytorch:26.06-py3

# The image's PyTorch, Transformer Engine and FlashAttention were built for each other. From here on pip keeps
# every version that the image has (in place of the image's own, longer list) and only adds what is missing.
RUN pip list --format=freeze > /etc/image-constraints.txt
ENV PIP_CONSTRAINT=/etc/image-constraints.txt PIP_NO_CACHE_DIR=1

# CUDA kernels, compiled here against the image's PyTorch: no isolated build with another PyTorch, and no
# ready-made wheel for another. Before COPY, so that a change of our code does not compile them again.
RUN CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
    pip install --no-build-isolation "causal-conv1d~=1.5" "mamba-ssm~=2.2" "flash-linear-attention~=0.4.0"

# Megatron-Core and the rest, as setup.cfg asks. Without the extra `gpu`: its first two come with the image.
WORKDIR /workspace/archscale-megatron
COPY . .
RUN pip install --no-build-isolation --editable "."
